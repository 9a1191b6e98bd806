"""Multi-SLERP: average several models on the hypersphere, in the tangent space at their mean, and project back.

Goddard 2025 (goddard.blog/posts/multislerp-wow-what-a-cool-idea).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def multislerp(group: TensorGroup) -> BlockFunction:
    """Merge by Multi-SLERP. `weight`: of each model; `normalize_weights`: scale the weights to sum to 1.

    UserError for vectors whose weighted mean is zero.
    """

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        if len(group.non_base_inputs) == 1:
            return blocks[group.non_base_inputs[0]]
        base = None if group.base is None else blocks[group.base]
        points = torch.stack([blocks[at] for at in group.non_base_inputs])
        if base is not None:
            points -= base
        made = spherical_mean(points, group)
        return made if base is None else made + base

    return piece


def spherical_mean(points: Tensor, group: TensorGroup) -> Tensor:
    """Return the spherical mean of vectors [models, values]."""
    tiny = group.tensor_parameters["eps"]
    weights = torch.tensor(group.get_parameter(), dtype=points.dtype)
    if group.tensor_parameters["normalize_weights"]:
        total = weights.sum()
        if float(total) == 0:
            raise UserError(
                f"multislerp: the weights of {group.name} sum to zero; change them, or set normalize_weights: false"
            )
        weights = weights / total
    lengths = torch.norm(points, dim=-1, keepdim=True)
    units = points / (lengths + tiny)
    mean = (units * weights.view(-1, 1)).sum(0)
    length = torch.norm(mean)
    if length < tiny:
        if len(points) == 2:
            return points[0] * weights[0] + points[1] * weights[1]
        raise UserError(
            f"multislerp: the weighted models of {group.name} point in opposite directions, so their mean is zero;"
            " change the weights"
        )
    mean = mean / length
    along = (units * mean).sum(-1, keepdim=True)
    step = ((units - along * mean) * weights.view(-1, 1)).sum(0)
    angle = torch.norm(step) + tiny
    made: Tensor = mean * torch.cos(angle) + step * (torch.sin(angle) / angle)
    size: Tensor = (lengths.squeeze(-1) * weights).sum()
    return made * size
