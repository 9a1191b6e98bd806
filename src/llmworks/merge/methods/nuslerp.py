"""NuSLERP: spherical interpolation between two models, or between their task vectors; of each tensor, or each row of
it.

mergekit's NuSLERP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup

TINY = 1e-8


def nuslerp(group: TensorGroup) -> BlockFunction:
    """Merge by NuSLERP. `weight`: of the two models; their ratio is the interpolation ratio.

    `nuslerp_flatten`: the tensor is one vector; otherwise its rows are, or its columns with `nuslerp_row_wise`.
    """
    first, second = group.get_parameter()
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    shape, flat, turn = (
        group.shape,
        group.tensor_parameters["nuslerp_flatten"],
        group.tensor_parameters["nuslerp_row_wise"],
    )

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        base = None if group.base is None else blocks[group.base]
        a, b = (blocks[at] if base is None else blocks[at] - base for at in group.non_base_inputs)
        if not flat:
            a, b = (one.view(shape) for one in (a, b))
            if turn:
                a, b = (one.transpose(0, -1) for one in (a, b))
        made = slerp_vectors(t, a, b)
        if turn and not flat:
            made = made.transpose(0, -1)
        made = made.reshape(-1)
        return made if base is None else base + made

    return piece


def slerp_vectors(t: float, a: Tensor, b: Tensor) -> Tensor:
    """Interpolate spherically between vectors in the last dimension; linearly where they are parallel."""
    units = [one / torch.norm(one, dim=-1, keepdim=True).clamp(min=1e-7) for one in (a, b)]
    cosine = (units[0] * units[1]).sum(dim=-1, keepdim=True).clamp(-1, 1)
    straight = (1 - cosine.square()) <= TINY**2
    angle = torch.acos(torch.where(straight, 0, cosine))
    made = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(straight, (1 - t) * a + t * b, made)
