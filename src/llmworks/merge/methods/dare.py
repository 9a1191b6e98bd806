"""DARE: drop most changes at random and rescale the rest. Yu et al. 2024 (arXiv:2311.03099).

Kept changes are divided by the density (section 3.1 of the paper), which preserves a change in expectation. mergekit
rescales so that the sum of absolute values is preserved: the same in expectation, to one part in a thousand for a
matrix of a million.
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

PLACES = 15  # maximum binary digits of a density


@dataclass(frozen=True)
class Dropped:
    """The random mask of an input's kept changes."""

    group: Group
    source: int
    density: float

    def mask(self, number: int, count: int) -> Tensor:
        """Return the mask of a block, all 8 bits set where a change is kept: where a random number is below the
        density, both with as many binary digits as the density has, at most 15.

        The comparison runs digit by digit from the lowest, for 64 changes at a time. Where the density's digit is 1, a
        number is below it if its digit is 0 or its lower digits are below; where the digit is 0, if its digit is 0 and
        its lower digits are below.
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
    """Merge by DARE: weighted sum of the kept changes. `density`: fraction that is kept."""
    return _dropped(group, elect=False)


def dare_ties(group: Group) -> Piece:
    """Merge by DARE with TIES sign election."""
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
