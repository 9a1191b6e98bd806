"""A tensor as it is, times a number where one is given (frankenmerges)."""

from __future__ import annotations

from llmworks.merge.group import Group, Piece


def passthrough(group: Group) -> Piece:
    """`scale`: what it is multiplied by."""
    scale = group.each[0]["scale"]
    return lambda blocks, _: blocks[0] if scale is None else blocks[0] * scale
