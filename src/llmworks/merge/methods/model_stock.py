"""Model Stock: interpolate between the base and the mean of fine-tuned models, by the angle between their task vectors.

Jang et al. 2024 (arXiv:2403.19522), equation 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def model_stock(group: TensorGroup) -> BlockFunction:
    """Merge by Model Stock. `filter_wise`: an interpolation ratio for each row, instead of one for the tensor."""
    rows = group.tensor_parameters["filter_wise"] and len(group.shape) > 1

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        assert group.base is not None
        base, *tuned = (
            blocks[at].view(group.shape) if rows else blocks[at] for at in (group.base, *group.non_base_inputs)
        )
        task_vectors = [one - base for one in tuned]
        cosines = []
        for at, one in enumerate(task_vectors):
            for other in task_vectors[at + 1 :]:
                lengths = torch.norm(one, dim=-1) * torch.norm(other, dim=-1)
                cosines.append(((one * other).sum(dim=-1) / lengths.clamp(min=1e-6)).clamp(-1, 1))
        cosine, count = torch.stack(cosines).mean(dim=0).unsqueeze(-1), len(tuned)
        below = 1 + (count - 1) * cosine
        lost = below.abs() < 1e-6  # opposite task vectors: only the base remains
        share = torch.where(
            lost, torch.zeros_like(cosine), count * cosine / torch.where(lost, torch.ones_like(below), below)
        )
        mean = sum(tuned[1:], start=tuned[0]) / count
        return (share * mean + (1 - share) * base).reshape(-1)

    return piece
