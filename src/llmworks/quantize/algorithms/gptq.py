"""GPTQ's solver: round a matrix column by column, compensating each error in the remaining columns.

Pure tensor functions.

Frantar et al. 2022 (arXiv:2210.17323), algorithm 1; act-order and static groups are those of its reference
implementation. Does not know models.
"""

from __future__ import annotations

from math import isfinite

import numpy as np
import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales, fit_scales, split_groups
from llmworks.quantize.algorithms.awq import search_clipping

LAZY = 128  # columns per lazy batch update
NEAR = 16  # columns within it whose errors are propagated one by one


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    dampening_frac: float = 0.01,
    act_order: bool = False,
    mse_scales: bool = True,
) -> IntegerMatrix:
    """Round a matrix [rows, columns] so that x W' changes little for inputs x with second moments `hessian` [columns,
    columns].

    dampening_frac: fraction of the Hessian's mean diagonal that is added to the diagonal. act_order: columns of large
    moments first; scales are then those of the original weights, so that groups stay intact. mse_scales: scales that
    minimize each group's output error under rounding to nearest; otherwise by largest and smallest weight, of each
    group as updated when its turn comes. Errors: ModelError for weights or moments with NaN or infinite values.
    """
    if not (isfinite(float(weight.sum(dtype=torch.float64))) and isfinite(float(hessian.sum(dtype=torch.float64)))):
        raise ModelError("weights or the moments of their inputs hold NaN or infinite values")
    columns, size = weight.shape[1], grid.get_group_size(weight.shape[1])
    rest, diagonal = weight.float().clone(), hessian.diagonal().to(torch.float64, copy=True)
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    rest[:, dead] = 0.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        rest, diagonal = rest[:, order], diagonal[order]
    upper = compute_inverse_cholesky(hessian, diagonal, dampening_frac, order)
    static_scales: Scales | None = None
    if mse_scales and grid.group != -1:
        static_scales = search_clipping(weight.float(), hessian.to(torch.float32), grid)
    elif order is not None or grid.group <= 0:
        static_scales = fit_scales(split_groups(weight.float(), grid), grid)
    codes, scale, zero = _update_columns(rest, upper, grid, size, static_scales, order)
    made = torch.empty_like(codes)
    made[:, torch.arange(columns) if order is None else order] = codes
    return IntegerMatrix(made, Scales(scale, zero), grid)


def compute_inverse_cholesky(
    moments: Tensor, diagonal: Tensor, dampening_frac: float, order: Tensor | None = None
) -> Tensor:
    """Return the upper Cholesky factor, fp32, of the inverse of a second-moment matrix, dampened until it has one: the
    inverse of R where the dampened moments are R R', R upper triangular.

    diagonal: the moments' diagonal, in `order` of columns; the moments are in the original order. R is computed in
    fp64; inverting it in fp32 costs about the last bit of the result.
    """
    back = (torch.arange(len(diagonal)) if order is None else order).flip(0)
    share = dampening_frac
    for _ in range(8):
        damped = moments.index_select(0, back).index_select(1, back).double()
        damped.diagonal().copy_(diagonal.flip(0) + share * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = invert_upper_triangular(lower.flip(0, 1).float())
            if isfinite(float(upper.sum())):
                return upper
        share = max(share * 10, 1e-4)
    raise ModelError(
        f"the Hessian of its inputs cannot be inverted, even with {share:g} of its mean diagonal added; give more"
        " calibration data"
    )


def invert_upper_triangular(matrix: Tensor) -> Tensor:
    """Invert an upper triangular matrix [count, count] recursively by halves: a third of the work of solving for all
    columns of the identity.
    """
    count = len(matrix)
    if count <= 96:
        made: Tensor = torch.linalg.solve_triangular(
            matrix, torch.eye(count, dtype=matrix.dtype, device=matrix.device), upper=True
        )
        return made
    half = count // 2
    whole = torch.zeros_like(matrix)
    whole[:half, :half], whole[half:, half:] = (
        invert_upper_triangular(matrix[:half, :half]),
        invert_upper_triangular(matrix[half:, half:]),
    )
    whole[:half, half:] = -(whole[:half, :half] @ matrix[:half, half:] @ whole[half:, half:])
    return whole


def _update_columns(
    rest: Tensor, upper: Tensor, grid: Grid, size: int, static_scales: Scales | None, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, scales, zero points), columns in processing order."""
    columns, rows = rest.shape[1], len(rest)
    turned = rest.T.contiguous()  # transposed, so that a column is contiguous
    codes = torch.empty(columns, rows)
    groups = 1 if grid.group == -1 else columns // size
    scale, zero = (
        (static_scales.scale.T.contiguous(), static_scales.zero.T.contiguous())
        if static_scales is not None
        else (torch.empty(groups, rows), torch.empty(groups, rows))
    )
    wide = LAZY if static_scales is not None else max(size, LAZY // size * size)
    of = (
        (torch.arange(columns) if order is None else order) // size
        if grid.group != -1
        else torch.zeros(columns, dtype=torch.long)
    )
    numbers, scales, zeros = of.tolist(), scale.numpy(), zero.numpy()
    for start in range(0, columns, wide):
        end = min(start + wide, columns)
        part, errors = turned[start:end], torch.empty(end - start, rows)
        corner = upper[start:end, start:end].contiguous()
        every, lost, done, pivots = (
            part.numpy(),
            errors.numpy(),
            codes[start:end].numpy(),
            corner.diagonal().tolist(),
        )  # numpy views of the same memory: much less overhead per small operation
        for i in range(end - start):
            column = start + i
            if static_scales is None and column % size == 0:
                found = fit_scales(part[i : i + size].T.reshape(rows, 1, size), grid)
                scale[numbers[column]], zero[numbers[column]] = found.scale[:, 0], found.zero[:, 0]
            code, error, s, z = done[i], lost[i], scales[numbers[column]], zeros[numbers[column]]
            np.divide(every[i], s, out=code)
            np.add(code, z, out=code)
            np.rint(code, out=code)
            np.minimum(np.maximum(code, grid.low, out=code), grid.high, out=code)
            np.subtract(code, z, out=error)
            np.multiply(error, s, out=error)
            np.subtract(every[i], error, out=error)
            np.divide(error, np.float32(pivots[i]), out=error)
            if i + 1 < end - start:
                near = min(i - i % NEAR + NEAR, end - start)
                part[i + 1 : near].addr_(corner[i, i + 1 : near], errors[i], alpha=-1)
                if i + 1 == near < end - start:
                    part[near:].addmm_(corner[near - NEAR : near, near:].T, errors[near - NEAR : near], alpha=-1)
        if end < columns:
            turned[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T.to(torch.int8).contiguous(), scale.T.contiguous(), zero.T.contiguous()
