"""GPTQ's solver: a matrix rounded column by column, each error made up for by the columns that are still to come. Pure tensor functions.

Frantar et al. 2022 (arXiv:2210.17323), algorithm 1; the order by activations and scales that are known beforehand are those of its reference implementation. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmworks.errors import ModelError
from llmworks.model.grid import Grid, Scales, Whole, fit, grouped
from llmworks.quantize.solvers.awq import clipped

LAZY = 128  # columns whose errors are passed on at once


def solve(weight: Tensor, hessian: Tensor, grid: Grid, *, damping: float = 0.01, by_activation: bool = False, search: bool = True) -> Whole:
    """Round a matrix [rows, columns] so that x W' changes little for inputs x of the second moments `hessian` [columns, columns].

    damping: share of the mean moment that is added to all. by_activation: columns of large moments first; scales are then those of the weights as they were, so that groups stay whole.
    search: scales by which a group's part of the outputs changes least when it is rounded to the nearest; else by largest and smallest weight, of each group as it is when its turn comes.
    Errors: ModelError for weights or moments that are no numbers.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise ModelError("weights or the moments of their inputs are no numbers (NaN or infinite)")
    columns, size = weight.shape[1], grid.size(weight.shape[1])
    moments, rest = hessian.to(torch.float64, copy=True), weight.float().clone()
    dead = moments.diagonal() <= 0
    moments.diagonal()[dead] = 1.0
    rest[:, dead] = 0.0
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if by_activation else None
    if order is not None:
        moments, rest = moments[order][:, order], rest[:, order]
    upper = inverse_root(moments, damping).to(torch.float32)
    known: Scales | None = None
    if search and grid.group != -1:
        known = clipped(weight.float(), hessian.to(torch.float32), grid)
    elif order is not None or grid.group <= 0:
        known = fit(grouped(weight.float(), grid), grid)
    codes, scale, zero = _columns(rest, upper, grid, size, known, order)
    made = torch.empty_like(codes)
    made[:, torch.arange(columns) if order is None else order] = codes
    return Whole(made, Scales(scale, zero), grid)


def inverse_root(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a matrix of second moments, damped until it has one: the inverse of R where the damped moments are R R', R upper triangular."""
    mean, count = moments.diagonal().mean(), len(moments)
    share = damping
    for _ in range(8):
        damped = moments + torch.eye(count, dtype=moments.dtype, device=moments.device) * (share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = inverse_of_upper(lower.flip(0, 1))
            if torch.isfinite(upper).all():
                return upper
        share = max(share * 10, 1e-4)
    raise ModelError(f"the moments of its inputs cannot be inverted, though {share:g} of their mean was added; give more calibration text")


def inverse_of_upper(matrix: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix [count, count], by halves: a third of the work of solving for all columns of the identity."""
    count = len(matrix)
    if count <= 96:
        made: Tensor = torch.linalg.solve_triangular(matrix, torch.eye(count, dtype=matrix.dtype, device=matrix.device), upper=True)
        return made
    half = count // 2
    whole = torch.zeros_like(matrix)
    whole[:half, :half], whole[half:, half:] = inverse_of_upper(matrix[:half, :half]), inverse_of_upper(matrix[half:, half:])
    whole[:half, half:] = -(whole[:half, :half] @ matrix[:half, half:] @ whole[half:, half:])
    return whole


def _columns(rest: Tensor, upper: Tensor, grid: Grid, size: int, known: Scales | None, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zero points), columns in their order of work."""
    columns, rows = rest.shape[1], len(rest)
    turned = rest.T.contiguous()  # a column is a row here, so that it is one piece
    codes = torch.empty(columns, rows)
    groups = 1 if grid.group == -1 else columns // size
    scale, zero = (known.scale.clone(), known.zero.clone()) if known is not None else (torch.empty(rows, groups), torch.empty(rows, groups))
    wide = LAZY if known is not None else max(size, LAZY // size * size)
    of = (torch.arange(columns) if order is None else order) // size if grid.group != -1 else torch.zeros(columns, dtype=torch.long)
    numbers = of.tolist()
    for start in range(0, columns, wide):
        end = min(start + wide, columns)
        part, errors = turned[start:end], torch.empty(end - start, rows)
        corner = upper[start:end, start:end]
        for i in range(end - start):
            column = start + i
            if known is None and column % size == 0:
                found = fit(part[i : i + size].T.reshape(rows, 1, size), grid)
                scale[:, numbers[column]], zero[:, numbers[column]] = found.scale[:, 0], found.zero[:, 0]
            s, z = scale[:, numbers[column]], zero[:, numbers[column]]
            code = (part[i] / s).add_(z).round_().clamp_(grid.low, grid.high)
            codes[column] = code
            error = (part[i] - (code - z) * s).div_(corner[i, i])
            errors[i] = error
            if i + 1 < end - start:
                part[i + 1 :].addr_(corner[i, i + 1 :], error, alpha=-1)
        if end < columns:
            turned[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T.to(torch.int8).contiguous(), scale, zero


def harm(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """The mean squared change of a layer's outputs, over its rows: of inputs with these second moments."""
    apart = (after - before).double()
    return float(((apart @ hessian.double()) * apart).sum() / len(before))
