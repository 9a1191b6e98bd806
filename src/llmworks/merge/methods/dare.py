"""Most changes dropped at random, the others made larger. Yu et al. 2024 (arXiv:2311.03099).

Those that are kept are divided by the density, as in the paper, section 3.1, so that a change is as it was on average. mergekit multiplies them so that the sum of sizes is as it was: the same on average, to a part in a thousand in a matrix of a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmworks.merge.group import Group, Piece, deltas
from llmworks.merge.methods.task_arithmetic import added, check, kept


@dataclass(frozen=True)
class Dropped:
    """Which changes of an input are kept, by chance."""

    group: Group
    source: int
    density: float

    def mask(self, number: int, count: int) -> Tensor:
        """Of a block, all bits of 16 set where a change is kept: a number of 15 bits, drawn for each, is below the density's share of them; of 7 bits where that says as much."""
        width = 8 if (self.density * (1 << 7)).is_integer() else 16
        drawn = self.group.bits(self.source, number, count, width)
        return drawn.bitwise_and_((1 << (width - 1)) - 1).sub_(round(self.density * (1 << (width - 1)))).bitwise_right_shift_(width - 1).to(torch.int16)


def dare_linear(group: Group) -> Piece:
    """The weighted sum of what is kept. `density`: its share."""
    return _dropped(group, elect=False)


def dare_ties(group: Group) -> Piece:
    """The same, with the sign by what most of the change has."""
    return _dropped(group, elect=True)


def _dropped(group: Group, *, elect: bool) -> Piece:
    check(group)
    densities = group.weights("density")
    drops = [None if density >= 1 else Dropped(group, at, max(0.0, density)) for at, density in zip(group.others, densities, strict=True)]
    larger = [1 / density if group.shared["rescale"] and 0 < density < 1 else 1.0 for density in densities]

    def piece(blocks: Sequence[Tensor], number: int) -> Tensor:
        changes = deltas(group, blocks)
        masked = [change if drop is None else kept(change, drop.mask(number, change.numel())) for change, drop in zip(changes, drops, strict=True)]
        return added(group, blocks, masked, elect=elect, larger=larger)

    return piece
