"""Arcee Fusion: keep only important changes. Importance is the size of a change times the KL divergence of its row's
softmax; changes of at least median + 1.5 IQR are kept.

As mergekit's `arcee_fusion`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup

SAMPLE = 1_000_000  # quartiles are estimated from at most this many changes, sampled at random


def arcee_fusion(group: TensorGroup) -> BlockFunction:
    """Return the base with the other model's weights where they are important."""
    assert group.base is not None
    first, second = group.base, 1 - group.base

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        base, tuned = blocks[first].view(group.shape), blocks[second].view(group.shape)
        after, before = F.softmax(tuned, dim=-1) + 1e-8, F.softmax(base, dim=-1) + 1e-8
        matters = (tuned - base).abs() * torch.sum(after * torch.log(after / before), dim=-1, keepdim=True)
        flat = matters.reshape(-1)
        if flat.numel() > SAMPLE:
            flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=group.make_generator(0, 0))]
        ordered = torch.sort(flat).values
        low, middle, high = ordered[(torch.tensor([0.25, 0.5, 0.75]) * (len(ordered) - 1)).long()]
        made: Tensor = base + (tuned - base) * (matters >= middle + 1.5 * (high - low)).float()
        return made.reshape(-1)

    return piece
