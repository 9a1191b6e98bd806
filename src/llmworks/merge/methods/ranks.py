"""Select changes by magnitude without sorting: count their bit patterns block by block until the k-th largest is known.

The bit patterns of |x| of a float are ordered like the values, so the k-th largest of 16 bits is found by one count of
32,768 patterns, that of 32 bits by a count of the upper halves and one of the lower halves. Among changes equal to the
last one kept, the first in tensor order are kept; an unstable sort may keep others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import Group, deltas
from llmworks.merge.methods.task_arithmetic import kept as keep

HALVES = 1 << 15


@dataclass(frozen=True)
class Edge:
    """A boundary in the magnitude order: a bit pattern, of which the first `ties_before` in tensor order lie before the
    boundary.

    `counts`: cumulative count of this pattern before each block.
    """

    pattern: int
    of_it: int
    before: tuple[int, ...]


@dataclass(frozen=True)
class Ranks:
    """Magnitudes between two boundaries in sort order (`ascending`: smallest first)."""

    low: Edge
    high: Edge
    upward: bool

    def mask(self, change: Tensor, number: int) -> Tensor:
        """Return the mask of a block, all bits set where a change is kept."""
        found = patterns(change)
        inside = self._within(found, self.high, number)
        return (
            inside
            if not self.low.pattern and not self.low.of_it and self.upward
            else inside & ~self._within(found, self.low, number)
        )

    def _within(self, found: Tensor, edge: Edge, number: int) -> Tensor:
        """Return a mask, all bits set where a magnitude lies before a boundary: the sign bit of a negative
        difference is shifted through.
        """
        shift = 8 * found.element_size() - 1
        here, left = edge.before[number + 1] - edge.before[number], edge.of_it - edge.before[number]
        if left >= here:  # all occurrences of the boundary's pattern in this block
            return (found - edge.pattern - 1) >> shift if self.upward else (edge.pattern - 1 - found) >> shift
        before = (found - edge.pattern) >> shift if self.upward else (edge.pattern - found) >> shift
        if left > 0:
            before[(found == edge.pattern).nonzero()[:left, 0]] = -1
        return before


def patterns(change: Tensor) -> Tensor:
    """Return the bits of |x| as integers, ordered like the magnitudes."""
    if change.dtype == torch.float64:
        change = change.float()
    if change.element_size() == 2:
        return change.view(torch.int16) & 0x7FFF
    return change.view(torch.int32) & 0x7FFFFFFF


def ranks_of(group: Group, wanted: Sequence[tuple[int, int] | None], *, upward: bool = False) -> list[Ranks | None]:
    """For each input other than the base, return the rank range of (number dropped first, number kept after them); None
    if all are kept.

    Reads the tensors once, tensors of 32 bits twice.
    """
    sides = [at for at, one in enumerate(wanted) if one is not None]
    if not sides:
        return [None] * len(wanted)
    counts = _counted(group, sides)
    if group.dtype in (torch.bfloat16, torch.float16):
        edges = {at: [_edge(counts[at], rank, upward) for rank in _ranks(wanted[at])] for at in sides}
    else:
        coarse = {at: [_place(counts[at].sum(axis=0), rank, upward) for rank in _ranks(wanted[at])] for at in sides}
        edges = _finer(group, coarse, upward)
    made = {at: Ranks(edges[at][0], edges[at][1], upward) for at in sides}
    for at in sides:
        group.notes["tied"] = group.notes.get("tied", 0) + sum(_torn(edge) for edge in edges[at])
    return [made.get(at) for at in range(len(wanted))]


def _ranks(wanted: tuple[int, int] | None) -> tuple[int, int]:
    assert wanted is not None
    return wanted[0], wanted[0] + wanted[1]


def _torn(edge: Edge) -> int:
    """Return the number of changes tied at a boundary, some kept and some not; 0 for zero changes, where the choice
    does not matter.
    """
    return edge.before[-1] if edge.pattern and 0 < edge.of_it < edge.before[-1] else 0


def _counted(group: Group, sides: Sequence[int]) -> dict[int, Any]:
    """Count for inputs the changes of each pattern, or of its upper half [blocks, HALVES]."""
    found = {at: np.zeros((group.pieces, HALVES), np.int32) for at in sides}
    for number, blocks in enumerate(group.blocks()):
        changes = deltas(group, blocks)
        for at in sides:
            bits = patterns(changes[at])
            found[at][number] = torch.bincount(
                bits if bits.dtype == torch.int16 else bits >> 16, minlength=HALVES
            ).numpy()
    return found


def _place(total: Any, rank: int, upward: bool) -> tuple[int, int]:
    """Return (the pattern that contains a rank, how many of it lie before the rank)."""
    ordered = total if upward else total[::-1]
    sums = np.cumsum(ordered, dtype=np.int64)
    at = min(int(np.searchsorted(sums, rank, side="left")), len(sums) - 1)
    return (at if upward else len(total) - 1 - at), rank - int(sums[at] - ordered[at])


def _edge(counts: Any, rank: int, upward: bool) -> Edge:
    pattern, of_it = _place(counts.sum(axis=0), rank, upward)
    return Edge(pattern, of_it, (0, *np.cumsum(counts[:, pattern], dtype=np.int64).tolist()))


def _finer(group: Group, coarse: dict[int, list[tuple[int, int]]], upward: bool) -> dict[int, list[Edge]]:
    """Refine boundaries of 32 bits: count the lower halves of patterns with the boundary's upper half."""
    found = {
        (at, side): np.zeros((group.pieces, 1 << 16), np.int32)
        for at, places in coarse.items()
        for side in range(len(places))
    }
    for number, blocks in enumerate(group.blocks()):
        changes = deltas(group, blocks)
        for (at, side), counts in found.items():
            bits = patterns(changes[at])
            inside = bits[(bits >> 16) == coarse[at][side][0]] & 0xFFFF
            counts[number] = np.bincount(inside.numpy(), minlength=1 << 16)
    made: dict[int, list[Edge]] = {}
    for (at, side), counts in found.items():
        upper, rank = coarse[at][side]
        edge = _edge(counts, rank, upward)
        made.setdefault(at, []).append(Edge((upper << 16) | edge.pattern, edge.of_it, edge.before))
    return made


def sums_of(group: Group, kept: Sequence[Any]) -> list[Tensor | None]:
    """With `rescale`, return factors that preserve the sum of absolute values of each change; None: no factor."""
    if not group.shared["rescale"] or all(one is None for one in kept):
        return [None] * len(kept)
    whole, part = ([torch.zeros(()) for _ in kept] for _ in range(2))
    for number, blocks in enumerate(group.blocks()):
        for at, change in enumerate(deltas(group, blocks)):
            if kept[at] is not None:
                size = change.abs()
                whole[at] = whole[at] + size.sum(dtype=torch.float32)
                part[at] = part[at] + keep(size, kept[at].mask(change, number)).sum(dtype=torch.float32)
    return [
        None if one is None or min(float(all_), float(some)) < 1e-7 else all_.to(group.dtype) / some.to(group.dtype)
        for one, all_, some in zip(kept, whole, part, strict=True)
    ]


def chosen(
    group: Group, blocks: Sequence[Tensor], masks: Sequence[Any], factors: Sequence[Tensor | None], number: int
) -> list[Tensor]:
    """Return the changes of a block with dropped ones zeroed and the rest rescaled."""
    found = []
    for change, mask, factor in zip(deltas(group, blocks), masks, factors, strict=True):
        one = change if mask is None else keep(change, mask.mask(change, number))
        found.append(one if factor is None else one * factor)
    return found
