"""Most changes dropped at random, the others made larger. Yu et al. 2024 (arXiv:2311.03099).

Those that are kept are divided by the density, as in the paper, section 3.1, so that a change is as it was on average.
mergekit multiplies them so that the sum of sizes is as it was: the same on average, to a part in a thousand in a matrix
of a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import Group, Piece, deltas
from llmworks.merge.methods.task_arithmetic import added, check, kept

PLACES = 15  # of a density, at most


@dataclass(frozen=True)
class Dropped:
    """Which changes of an input are kept, by chance."""

    group: Group
    source: int
    density: float

    def mask(self, number: int, count: int) -> Tensor:
        """Of a block, all bits of 8 set where a change is kept: where a random number is below the density, both of as
        many binary places as that has, 15 at most.

        They are compared place by place, the lowest first, of 64 changes at once: at a place where the density has 1, a
        number is below it that has 0 there, or is below it by the lower places; where the density has 0, a number that
        has 0 and is.
        """
        share, places = round(self.density * (1 << PLACES)), PLACES
        if share == 1 << PLACES:
            return torch.full((count,), -1, dtype=torch.int8)
        while places > 1 and not share & 1:
            share, places = share >> 1, places - 1
        size = -(-count // 64)
        below: Any = np.zeros(size, np.uint64)
        for place, zero in enumerate(self.group.words(self.source, number, places * size).reshape(places, size)):
            (np.bitwise_or if share >> place & 1 else np.bitwise_and)(below, zero, out=below)
        return torch.from_numpy(
            np.unpackbits(below.view(np.uint8), count=count, bitorder="little").view(np.int8)
        ).neg_()


def dare_linear(group: Group) -> Piece:
    """The weighted sum of what is kept. `density`: its share."""
    return _dropped(group, elect=False)


def dare_ties(group: Group) -> Piece:
    """The same, with the sign by what most of the change has."""
    return _dropped(group, elect=True)


def _dropped(group: Group, *, elect: bool) -> Piece:
    check(group)
    densities = group.weights("density")
    drops = [
        None if density >= 1 else Dropped(group, at, max(0.0, density))
        for at, density in zip(group.others, densities, strict=True)
    ]
    larger = [1 / density if group.shared["rescale"] and 0 < density < 1 else 1.0 for density in densities]

    def piece(blocks: Sequence[Tensor], number: int) -> Tensor:
        changes = deltas(group, blocks)
        masked = [
            change if drop is None else kept(change, drop.mask(number, change.numel()))
            for change, drop in zip(changes, drops, strict=True)
        ]
        return added(group, blocks, masked, elect=elect, larger=larger)

    return piece
