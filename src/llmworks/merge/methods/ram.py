"""Changes that one model alone made are kept whole, those that several made are averaged.

Reinforced Agent Merging (arXiv:2601.13572).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import Group, Piece, deltas


def ram(group: Group) -> Piece:
    """`epsilon`: the size below which a change is none."""
    return lambda blocks, _: _merged(group, blocks, plus=False)


def ramplus_tl(group: Group) -> Piece:
    """The same, what one model alone changed made larger by how much it shares: by `r`, at most `alpha`, tensor by
    tensor.
    """
    return lambda blocks, _: _merged(group, blocks, plus=True)


def _merged(group: Group, blocks: Sequence[Tensor], *, plus: bool) -> Tensor:
    assert group.base is not None
    base = blocks[group.base]
    if not group.others:
        return base
    changes, tiny = torch.stack(deltas(group, blocks)), group.shared["epsilon"]
    made = changes.abs() > tiny
    counts = made.sum(dim=0, keepdim=True)
    shared, alone = counts > 1, counts == 1
    changes = changes * made
    own = changes * alone
    if plus:
        ratio = (made & shared).sum(dim=1) / (made & alone).sum(dim=1).clamp(min=tiny)
        own = own * (1 + group.shared["r"] * ratio.clamp(min=0, max=group.shared["alpha"])).unsqueeze(-1)
    merged: Tensor = base + (own + changes * shared / counts.clamp(min=1)).sum(dim=0)
    return merged
