"""Karcher (Riemannian) mean of the models' directions, scaled by their mean norm.

Karcher 1977; as mergekit's `karcher`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def karcher(group: TensorGroup) -> BlockFunction:
    """Merge by the Karcher mean. `max_iter`: maximum iterations; `tol`: step size at which the iteration stops."""
    return lambda blocks, _: karcher_mean(blocks, group.tensor_parameters["max_iter"], group.tensor_parameters["tol"])


def karcher_mean(models: Sequence[Tensor], max_iter: int, tol: float) -> Tensor:
    """Return the Karcher mean of vectors [values]: the point of the sphere with the least sum of squared geodesic
    distances, by gradient steps in the tangent space; scaled by the mean norm.
    """
    if len(models) == 1:
        return models[0]
    wide, kind = torch.float64 if models[0].dtype == torch.float64 else torch.float32, models[0].dtype
    lengths = [torch.linalg.vector_norm(one.to(wide)) for one in models]
    units = [(one / length).to(kind) for one, length in zip(models, lengths, strict=True) if float(length) > tol]
    if not units:
        return torch.zeros_like(models[0])
    share = (1.0 / len(models)) / sum([1.0 / len(models)] * len(units))
    mean = torch.zeros_like(units[0])
    for unit in units:
        mean += share * unit
    length = torch.linalg.vector_norm(mean.to(wide))
    mean = units[0].clone() if float(length) < tol else (mean / length).to(kind)
    for _ in range(max_iter):
        step = torch.zeros_like(mean)
        for unit in units:
            cosine = torch.clamp(torch.dot(mean, unit), -1.0, 1.0)
            angle = torch.arccos(cosine)
            if float(angle) >= tol:
                step += share * (angle / torch.sin(angle)) * (unit - cosine * mean)
        length = torch.linalg.vector_norm(step.to(wide))
        if float(length) < tol:
            break
        mean = (torch.cos(length) * mean + torch.sin(length) * (step / length)).to(kind)
        size = torch.linalg.vector_norm(mean.to(wide))
        if float(size) > tol:
            mean = (mean / size).to(kind)
    size = torch.zeros(())
    for one in lengths:
        size = size + (1.0 / len(models)) * one
    made: Tensor = size * mean
    return made
