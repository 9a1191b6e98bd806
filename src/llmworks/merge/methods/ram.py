"""RAM: keep changes made by only one model, average changes made by several.

Reinforced Agent Merging (arXiv:2601.13572).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup, task_vectors


def ram(group: TensorGroup) -> BlockFunction:
    """Merge by RAM. `epsilon`: absolute value up to which a change counts as none."""
    return lambda blocks, _: _ram(group, blocks, plus=False)


def ramplus_tl(group: TensorGroup) -> BlockFunction:
    """Merge by RAM+: changes of only one model are scaled up by 1 + r times its ratio of shared to own changes, the
    ratio being at most `alpha`; tensor by tensor.
    """
    return lambda blocks, _: _ram(group, blocks, plus=True)


def _ram(group: TensorGroup, blocks: Sequence[Tensor], *, plus: bool) -> Tensor:
    assert group.base is not None
    base = blocks[group.base]
    if not group.non_base_inputs:
        return base
    changes, tiny = torch.stack(task_vectors(group, blocks)), group.tensor_parameters["epsilon"]
    made = changes.abs() > tiny
    counts = made.sum(dim=0, keepdim=True)
    shared, alone = counts > 1, counts == 1
    changes = changes * made
    own = changes * alone
    if plus:
        ratio = (made & shared).sum(dim=1) / (made & alone).sum(dim=1).clamp(min=tiny)
        own = own * (
            1 + group.tensor_parameters["r"] * ratio.clamp(min=0, max=group.tensor_parameters["alpha"])
        ).unsqueeze(-1)
    merged: Tensor = base + (own + changes * shared / counts.clamp(min=1)).sum(dim=0)
    return merged
