"""SLERP: spherical linear interpolation between two models, each tensor as one vector.

Shoemake 1985, "Animating rotation with quaternion curves".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup

STRAIGHT = 0.9995  # |cosine| above which vectors count as parallel and are interpolated linearly
TINY = 1e-8


def slerp(group: TensorGroup) -> BlockFunction:
    """Merge by SLERP. `t`: 0 is the base, 1 the other."""
    assert group.base is not None
    wide = torch.float64 if group.dtype == torch.float64 else torch.float32
    first, second = group.base, 1 - group.base
    lengths: list[list[float]] = [
        [],
        [],
    ]  # floats, not tensors: small tensors between large freed ones fragment memory
    for blocks in group.iter_blocks():
        for side, at in enumerate((first, second)):
            lengths[side].append(float(torch.linalg.vector_norm(blocks[at].to(wide)[None], dim=1, keepdim=True)))
    a, b = (torch.linalg.vector_norm(torch.tensor(parts, dtype=wide).view(-1, 1, 1), dim=0) for parts in lengths)
    a, b = (torch.where(length > TINY, length, 1) for length in (a, b))
    parts = [
        float(((blocks[first].to(wide)[None] / a) * (blocks[second].to(wide)[None] / b)).sum(dim=1, keepdim=True))
        for blocks in group.iter_blocks()
    ]
    cosine = torch.tensor(parts, dtype=wide).view(-1, 1, 1).sum(dim=0).clamp(-1, 1)
    t = torch.tensor([[group.tensor_parameters["t"]]], dtype=wide)
    straight = cosine.abs() > STRAIGHT
    angle = torch.acos(torch.where(straight, 0, cosine))
    of_first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))[0]
    of_second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))[0]

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        return of_first * blocks[first].to(wide) + of_second * blocks[second].to(wide)

    return piece
