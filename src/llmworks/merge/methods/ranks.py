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

from llmworks.merge.execute.tensor_group import TensorGroup, task_vectors
from llmworks.merge.methods.task_arithmetic import apply_bit_mask as keep

HALVES = 1 << 15


@dataclass(frozen=True)
class RankBoundary:
    """A boundary in the magnitude order: a bit pattern, of which the first `ties_before` in tensor order lie before the
    boundary.

    `counts`: cumulative count of this pattern before each block.
    """

    pattern: int
    ties_before: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RankRange:
    """Magnitudes between two boundaries in sort order (`ascending`: smallest first)."""

    low: RankBoundary
    high: RankBoundary
    ascending: bool

    def mask(self, change: Tensor, number: int) -> Tensor:
        """Return the mask of a block, all bits set where a change is kept."""
        found = magnitude_bits(change)
        inside = self._is_before(found, self.high, number)
        return (
            inside
            if not self.low.pattern and not self.low.ties_before and self.ascending
            else inside & ~self._is_before(found, self.low, number)
        )

    def _is_before(self, found: Tensor, boundary: RankBoundary, number: int) -> Tensor:
        """Return a mask, all bits set where a magnitude lies before a boundary: the sign bit of a negative
        difference is shifted through.
        """
        shift = 8 * found.element_size() - 1
        here, left = (
            boundary.counts[number + 1] - boundary.counts[number],
            boundary.ties_before - boundary.counts[number],
        )
        if left >= here:  # all occurrences of the boundary's pattern in this block
            return (
                (found - boundary.pattern - 1) >> shift if self.ascending else (boundary.pattern - 1 - found) >> shift
            )
        before = (found - boundary.pattern) >> shift if self.ascending else (boundary.pattern - found) >> shift
        if left > 0:
            before[(found == boundary.pattern).nonzero()[:left, 0]] = -1
        return before


def magnitude_bits(change: Tensor) -> Tensor:
    """Return the bits of |x| as integers, ordered like the magnitudes."""
    if change.dtype == torch.float64:
        change = change.float()
    if change.element_size() == 2:
        return change.view(torch.int16) & 0x7FFF
    return change.view(torch.int32) & 0x7FFFFFFF


def select_ranks(
    group: TensorGroup, wanted: Sequence[tuple[int, int] | None], *, ascending: bool = False
) -> list[RankRange | None]:
    """For each input other than the base, return the rank range of (number dropped first, number kept after them); None
    if all are kept.

    Reads the tensors once, tensors of 32 bits twice.
    """
    sides = [at for at, one in enumerate(wanted) if one is not None]
    if not sides:
        return [None] * len(wanted)
    counts = _count_patterns(group, sides)
    if group.dtype in (torch.bfloat16, torch.float16):
        edges = {
            at: [_make_boundary(counts[at], rank, ascending) for rank in _get_rank_bounds(wanted[at])] for at in sides
        }
    else:
        coarse = {
            at: [_find_rank(counts[at].sum(axis=0), rank, ascending) for rank in _get_rank_bounds(wanted[at])]
            for at in sides
        }
        edges = _refine_boundaries(group, coarse, ascending)
    made = {at: RankRange(edges[at][0], edges[at][1], ascending) for at in sides}
    for at in sides:
        group.notes["tied"] = group.notes.get("tied", 0) + sum(_count_split_ties(edge) for edge in edges[at])
    return [made.get(at) for at in range(len(wanted))]


def _get_rank_bounds(wanted: tuple[int, int] | None) -> tuple[int, int]:
    assert wanted is not None
    return wanted[0], wanted[0] + wanted[1]


def _count_split_ties(edge: RankBoundary) -> int:
    """Return the number of changes tied at a boundary, some kept and some not; 0 for zero changes, where the choice
    does not matter.
    """
    return edge.counts[-1] if edge.pattern and 0 < edge.ties_before < edge.counts[-1] else 0


def _count_patterns(group: TensorGroup, sides: Sequence[int]) -> dict[int, Any]:
    """Count for inputs the changes of each pattern, or of its upper half [blocks, HALVES]."""
    found = {at: np.zeros((group.num_blocks, HALVES), np.int32) for at in sides}
    for number, blocks in enumerate(group.iter_blocks()):
        changes = task_vectors(group, blocks)
        for at in sides:
            bits = magnitude_bits(changes[at])
            found[at][number] = torch.bincount(
                bits if bits.dtype == torch.int16 else bits >> 16, minlength=HALVES
            ).numpy()
    return found


def _find_rank(total: Any, rank: int, upward: bool) -> tuple[int, int]:
    """Return (the pattern that contains a rank, how many of it lie before the rank)."""
    ordered = total if upward else total[::-1]
    sums = np.cumsum(ordered, dtype=np.int64)
    at = min(int(np.searchsorted(sums, rank, side="left")), len(sums) - 1)
    return (at if upward else len(total) - 1 - at), rank - int(sums[at] - ordered[at])


def _make_boundary(counts: Any, rank: int, upward: bool) -> RankBoundary:
    pattern, of_it = _find_rank(counts.sum(axis=0), rank, upward)
    return RankBoundary(pattern, of_it, (0, *np.cumsum(counts[:, pattern], dtype=np.int64).tolist()))


def _refine_boundaries(
    group: TensorGroup, coarse: dict[int, list[tuple[int, int]]], upward: bool
) -> dict[int, list[RankBoundary]]:
    """Refine boundaries of 32 bits: count the lower halves of patterns with the boundary's upper half."""
    found = {
        (at, side): np.zeros((group.num_blocks, 1 << 16), np.int32)
        for at, places in coarse.items()
        for side in range(len(places))
    }
    for number, blocks in enumerate(group.iter_blocks()):
        changes = task_vectors(group, blocks)
        for (at, side), counts in found.items():
            bits = magnitude_bits(changes[at])
            inside = bits[(bits >> 16) == coarse[at][side][0]] & 0xFFFF
            counts[number] = np.bincount(inside.numpy(), minlength=1 << 16)
    made: dict[int, list[RankBoundary]] = {}
    for (at, side), counts in found.items():
        upper, rank = coarse[at][side]
        edge = _make_boundary(counts, rank, upward)
        made.setdefault(at, []).append(RankBoundary((upper << 16) | edge.pattern, edge.ties_before, edge.counts))
    return made


def compute_rescale_factors(group: TensorGroup, masks: Sequence[Any]) -> list[Tensor | None]:
    """With `rescale`, return factors that preserve the sum of absolute values of each change; None: no factor."""
    if not group.tensor_parameters["rescale"] or all(one is None for one in masks):
        return [None] * len(masks)
    whole, part = ([torch.zeros(()) for _ in masks] for _ in range(2))
    for number, blocks in enumerate(group.iter_blocks()):
        for at, change in enumerate(task_vectors(group, blocks)):
            if masks[at] is not None:
                size = change.abs()
                whole[at] = whole[at] + size.sum(dtype=torch.float32)
                part[at] = part[at] + keep(size, masks[at].mask(change, number)).sum(dtype=torch.float32)
    return [
        None if one is None or min(float(all_), float(some)) < 1e-7 else all_.to(group.dtype) / some.to(group.dtype)
        for one, all_, some in zip(masks, whole, part, strict=True)
    ]


def select_changes(
    group: TensorGroup, blocks: Sequence[Tensor], masks: Sequence[Any], factors: Sequence[Tensor | None], number: int
) -> list[Tensor]:
    """Return the changes of a block with dropped ones zeroed and the rest rescaled."""
    found = []
    for change, mask, factor in zip(task_vectors(group, blocks), masks, factors, strict=True):
        one = change if mask is None else keep(change, mask.mask(change, number))
        found.append(one if factor is None else one * factor)
    return found
