"""Linear merge: weighted mean of models (model soups). Wortsman et al. 2022 (arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def linear(group: TensorGroup) -> BlockFunction:
    """Return sum w x, divided by sum w if `normalize`; summed in fp32 at least. UserError for weights with zero sum."""
    wide = torch.float64 if group.dtype == torch.float64 else torch.float32
    weights = torch.tensor([[float(one["weight"]) for one in group.input_parameters]], dtype=wide)
    total = weights.sum(dim=1)
    if group.tensor_parameters["normalize"] and not float(total.abs()) > 1e-12:
        raise UserError(
            f"linear: the weights of {group.name} sum to zero, so their mean is undefined; change them, or set"
            " normalize: false"
        )

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        made = torch.zeros_like(blocks[0], dtype=wide)
        for block, weight in zip(blocks, weights[0], strict=True):
            made.addcmul_(block, weight)
        if group.tensor_parameters["normalize"]:
            made.div_(total)
        return made

    return piece
