"""DELLA: drop changes at random, small ones with higher probability, by rank in their row. Deep et al. 2024
(arXiv:2406.11617).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup, task_vectors
from llmworks.merge.methods.task_arithmetic import add_task_vectors, check_weights


def della(group: TensorGroup) -> BlockFunction:
    """Merge by DELLA with TIES sign election. `density`: fraction that is kept; `epsilon`: keep probabilities range
    from density - epsilon for the smallest to density + epsilon for the largest changes.
    """
    return _della(group, elect=True)


def della_linear(group: TensorGroup) -> BlockFunction:
    """Merge by DELLA without sign election."""
    return _della(group, elect=False)


def _della(group: TensorGroup, *, elect: bool) -> BlockFunction:
    check_weights(group)
    densities, spreads = group.get_parameter("density"), group.get_parameter("epsilon")
    for density, spread in zip(densities, spreads, strict=True):
        if 0 < density < 1 and not (density - spread > 0 and density + spread < 1):
            raise UserError(
                f"della: density {density:g} and epsilon {spread:g}: keep probabilities range from"
                f" {density - spread:g} to {density + spread:g}, they must be between 0 and 1"
            )

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        changes = [
            magprune(change.view(group.shape), density, spread, group, at).reshape(-1)
            for at, (change, density, spread) in enumerate(
                zip(task_vectors(group, blocks), densities, spreads, strict=True)
            )
        ]
        return add_task_vectors(group, blocks, changes, elect=elect)

    return piece


def magprune(change: Tensor, density: float, epsilon: float, group: TensorGroup, input_index: int) -> Tensor:
    """Prune a change [rows, columns] (MAGPRUNE); with `rescale`, preserve its sum of absolute values."""
    if density >= 1:
        return change
    if density <= 0:
        return torch.zeros_like(change)
    flat = change if change.ndim > 1 else change[None]
    ranks = flat.abs().argsort(dim=1).argsort(dim=1).float()
    keep_probabilities = density - epsilon + 2 * epsilon * ranks / max(1, flat.shape[1] - 1)
    kept = flat * torch.bernoulli(keep_probabilities, generator=group.make_generator(input_index, 0)).to(flat.dtype)
    if group.tensor_parameters["rescale"]:
        before, after = flat.abs().sum(dtype=torch.float32), kept.abs().sum(dtype=torch.float32)
        if min(float(before), float(after)) >= 1e-7:
            kept = kept * (before / after).to(kept.dtype)
    return kept.reshape(change.shape)
