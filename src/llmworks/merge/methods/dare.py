"""Most changes dropped at random, the others made larger. Yu et al. 2024 (arXiv:2311.03099).

Those that are kept are divided by the density, as in the paper, section 3.1, so that a change is as it was on average. mergekit multiplies them so that the sum of sizes is as it was: the same on average, to a part in a thousand in a matrix of a million.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmworks.merge.group import Group, Piece
from llmworks.merge.methods.ranks import chosen
from llmworks.merge.methods.task_arithmetic import added, check


@dataclass(frozen=True)
class Dropped:
    """Which changes of an input are kept, by chance."""

    group: Group
    source: int
    density: float

    def mask(self, change: Tensor, number: int) -> Tensor:
        """Of a block, all bits set where a change is kept: a number of 15 bits, drawn for each, is below the density's share of them."""
        count = change.numel()
        drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=self.group.generator(self.source, number))
        return ((drawn.view(torch.int16)[:count] & 0x7FFF) - round(self.density * (1 << 15))) >> 15


def dare_linear(group: Group) -> Piece:
    """The weighted sum of what is kept. `density`: its share."""
    return _dropped(group, elect=False)


def dare_ties(group: Group) -> Piece:
    """The same, with the sign by what most of the change has."""
    return _dropped(group, elect=True)


def _dropped(group: Group, *, elect: bool) -> Piece:
    check(group)
    densities = group.weights("density")
    kept = [None if density >= 1 else Dropped(group, at, max(0.0, density)) for at, density in zip(group.others, densities, strict=True)]
    factors = [torch.tensor(1 / density, dtype=group.dtype) if group.shared["rescale"] and 0 < density < 1 else None for density in densities]
    return lambda blocks, number: added(group, blocks, chosen(group, blocks, kept, factors, number), elect=elect)
