"""DELLA: drop changes at random, small ones with higher probability, by rank in their row. Deep et al. 2024
(arXiv:2406.11617).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.tensor_group import Group, Piece, deltas
from llmworks.merge.methods.task_arithmetic import added, check


def della(group: Group) -> Piece:
    """Merge by DELLA with TIES sign election. `density`: fraction that is kept; `epsilon`: keep probabilities range
    from density - epsilon for the smallest to density + epsilon for the largest changes.
    """
    return _pruned(group, elect=True)


def della_linear(group: Group) -> Piece:
    """Merge by DELLA without sign election."""
    return _pruned(group, elect=False)


def _pruned(group: Group, *, elect: bool) -> Piece:
    check(group)
    densities, spreads = group.weights("density"), group.weights("epsilon")
    for density, spread in zip(densities, spreads, strict=True):
        if 0 < density < 1 and not (density - spread > 0 and density + spread < 1):
            raise UserError(
                f"della: density {density:g} and epsilon {spread:g}: keep probabilities range from"
                f" {density - spread:g} to {density + spread:g}, they must be between 0 and 1"
            )

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        changes = [
            pruned(change.view(group.shape), density, spread, group, at).reshape(-1)
            for at, (change, density, spread) in enumerate(zip(deltas(group, blocks), densities, spreads, strict=True))
        ]
        return added(group, blocks, changes, elect=elect)

    return piece


def pruned(change: Tensor, density: float, spread: float, group: Group, source: int) -> Tensor:
    """Prune a change [rows, columns] (MAGPRUNE); with `rescale`, preserve its sum of absolute values."""
    if density >= 1:
        return change
    if density <= 0:
        return torch.zeros_like(change)
    flat = change if change.ndim > 1 else change[None]
    ranks = flat.abs().argsort(dim=1).argsort(dim=1).float()
    chances = density - spread + 2 * spread * ranks / max(1, flat.shape[1] - 1)
    kept = flat * torch.bernoulli(chances, generator=group.generator(source, 0)).to(flat.dtype)
    if group.shared["rescale"]:
        before, after = flat.abs().sum(dtype=torch.float32), kept.abs().sum(dtype=torch.float32)
        if min(float(before), float(after)) >= 1e-7:
            kept = kept * (before / after).to(kept.dtype)
    return kept.reshape(change.shape)
