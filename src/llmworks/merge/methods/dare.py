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

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup, task_vectors
from llmworks.merge.methods.task_arithmetic import add_task_vectors, apply_bit_mask, check_weights

MAX_BINARY_DIGITS = 15  # maximum binary digits of a density


@dataclass(frozen=True)
class DropMask:
    """The random mask of an input's kept changes."""

    group: TensorGroup
    input_index: int
    density: float

    def mask(self, number: int, count: int) -> Tensor:
        """Return the mask of a block, all 8 bits set where a change is kept: where a random number is below the
        density, both with as many binary digits as the density has, at most 15.

        The comparison runs digit by digit from the lowest, for 64 changes at a time. Where the density's digit is 1, a
        number is below it if its digit is 0 or its lower digits are below; where the digit is 0, if its digit is 0 and
        its lower digits are below.
        """
        share, places = round(self.density * (1 << MAX_BINARY_DIGITS)), MAX_BINARY_DIGITS
        if share == 1 << MAX_BINARY_DIGITS:
            return torch.full((count,), -1, dtype=torch.int8)
        while places > 1 and not share & 1:
            share, places = share >> 1, places - 1
        size = -(-count // 64)
        below: Any = np.zeros(size, np.uint64)
        for place, zero in enumerate(
            self.group.random_words(self.input_index, number, places * size).reshape(places, size)
        ):
            (np.bitwise_or if share >> place & 1 else np.bitwise_and)(below, zero, out=below)
        return torch.from_numpy(
            np.unpackbits(below.view(np.uint8), count=count, bitorder="little").view(np.int8)
        ).neg_()


def dare_linear(group: TensorGroup) -> BlockFunction:
    """Merge by DARE: weighted sum of the kept changes. `density`: fraction that is kept."""
    return _dare(group, elect=False)


def dare_ties(group: TensorGroup) -> BlockFunction:
    """Merge by DARE with TIES sign election."""
    return _dare(group, elect=True)


def _dare(group: TensorGroup, *, elect: bool) -> BlockFunction:
    check_weights(group)
    densities = group.get_parameter("density")
    drops = [
        None if density >= 1 else DropMask(group, at, max(0.0, density))
        for at, density in zip(group.non_base_inputs, densities, strict=True)
    ]
    rescale = [1 / density if group.tensor_parameters["rescale"] and 0 < density < 1 else 1.0 for density in densities]

    def piece(blocks: Sequence[Tensor], number: int) -> Tensor:
        changes = task_vectors(group, blocks)
        masked = [
            change if drop is None else apply_bit_mask(change, drop.mask(number, change.numel()))
            for change, drop in zip(changes, drops, strict=True)
        ]
        return add_task_vectors(group, blocks, masked, elect=elect, rescale=rescale)

    return piece
