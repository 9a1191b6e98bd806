"""What models learned, added to what they learned it on; the end that TIES, DARE, DELLA and breadcrumbs share. Ilharco et al. 2023 (arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.errors import UserError
from llmworks.merge.group import Group, Piece, deltas


def task_arithmetic(group: Group) -> Piece:
    """Base + lambda sum w (x - base)."""
    check(group)
    return lambda blocks, _: added(group, blocks, deltas(group, blocks), elect=False)


def check(group: Group) -> None:
    """UserError for weights that `normalize` cannot divide by."""
    weights = group.weights()
    if group.shared["normalize"] and weights and all(weight == 0 for weight in weights):
        raise UserError(f"{group.name}: all weights are zero, so that their mean is undefined; change them, or set normalize: false")


def added(group: Group, blocks: Sequence[Tensor], changes: Sequence[Tensor], *, elect: bool) -> Tensor:
    """A block of the base and the weighted changes of the others.

    elect: only changes of the sign that most of the change has count (TIES, section 3; the mean is over those that have it).
    """
    assert group.base is not None
    base = blocks[group.base]
    if not changes:
        return base
    weights = torch.tensor(group.weights(), dtype=base.dtype)
    weights = weights.view(-1, *[1] * base.ndim)
    stacked = torch.stack(list(changes)).mul_(weights)
    if elect:
        upward = stacked.sum(dim=0) >= 0
        agree = torch.where(upward, stacked > 0, stacked < 0)
        moved = stacked.mul_(agree).sum(dim=0)
        divisor = (weights * agree).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        moved, divisor = stacked.sum(dim=0), weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    if group.shared["normalize"]:
        moved /= divisor
    if group.shared["lambda"] != 1:
        moved *= group.shared["lambda"]
    return base + moved
