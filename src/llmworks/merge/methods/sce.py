"""SCE: select the changes with the largest variance between models, calculate model weights from the size of their
changes, erase changes of the minority sign.

Wan et al. 2024 (arXiv:2408.07990).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup, task_vectors


def sce(group: TensorGroup) -> BlockFunction:
    """Merge by SCE. `select_topk`: fraction that is kept of the changes with nonzero variance."""
    share = group.tensor_parameters["select_topk"]

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        assert group.base is not None
        base = blocks[group.base]
        if not group.non_base_inputs:
            return base
        changes = torch.stack(task_vectors(group, blocks))
        if share < 1:
            changes = changes * select_by_variance(changes, share)
        upward = changes.sum(dim=0) >= 0
        agree = torch.where(upward, changes > 0, changes < 0)
        sizes = changes.square().reshape(len(changes), -1).mean(dim=1)
        total = float(sizes.sum())
        weights = torch.ones_like(sizes) / len(sizes) if abs(total) < 1e-6 else sizes / total
        counted = weights.view(-1, *[1] * base.ndim) * agree
        return base + (changes * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=1e-6)

    return piece


def select_by_variance(changes: Tensor, share: float) -> Tensor:
    """Return 1 where changes [models, values] vary most."""
    variance = torch.var(changes, dim=0, unbiased=False)
    made = torch.zeros_like(variance)
    most = int(int(torch.count_nonzero(variance)) * share) if share > 0 else 0
    if most:
        made[torch.topk(variance.abs(), k=most, largest=True).indices] = 1
    return made
