"""Only the changes that matter: by their size and by how far the softmax of their row is moved, those beyond the upper
fence of all.

As mergekit's `arcee_fusion`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.merge.execute.tensor_group import Group, Piece

SAMPLE = 1_000_000  # of how many changes quartiles are taken, where there are more: drawn at random


def arcee_fusion(group: Group) -> Piece:
    """The base, with the other's weight where it is important."""
    assert group.base is not None
    first, second = group.base, 1 - group.base

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        base, tuned = blocks[first].view(group.shape), blocks[second].view(group.shape)
        after, before = F.softmax(tuned, dim=-1) + 1e-8, F.softmax(base, dim=-1) + 1e-8
        matters = (tuned - base).abs() * torch.sum(after * torch.log(after / before), dim=-1, keepdim=True)
        flat = matters.reshape(-1)
        if flat.numel() > SAMPLE:
            flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=group.generator(0, 0))]
        ordered = torch.sort(flat).values
        low, middle, high = ordered[(torch.tensor([0.25, 0.5, 0.75]) * (len(ordered) - 1)).long()]
        made: Tensor = base + (tuned - base) * (matters >= middle + 1.5 * (high - low)).float()
        return made.reshape(-1)

    return piece
