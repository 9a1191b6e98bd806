"""Passthrough: copy a tensor unchanged, or scaled (frankenmerges)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def passthrough(group: TensorGroup) -> BlockFunction:
    """Copy the only input. `scale`: factor; `noise`, for experts: standard deviation of added Gaussian noise."""
    scale, noise = group.input_parameters[0]["scale"], group.input_parameters[0].get("noise")

    def piece(blocks: Sequence[Tensor], number: int) -> Tensor:
        made = blocks[0]
        if noise:
            made = made + torch.empty_like(made).normal_(0, noise, generator=group.make_generator(0, number))
        return made if scale is None else made * scale

    return piece
