"""AWQ: before rounding, scale down large inputs and scale up their weight columns, which reduces the error where it
matters.

Pure tensor functions.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: s = mean|x|^a, a between 0 and 1 by grid search. A layer's output error
is computed exactly from the second moments of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.model.lowbit.integer import (
    Grid,
    Scales,
    compute_extremes,
    dequantize_groups,
    fit_scales,
    quantize_groups,
    split_groups,
)

GRID_STEPS = 20  # exponents of the grid search
COARSE = tuple(1 - 0.04 * step for step in range(15))  # clipping ratios of the first search
FINE = (-0.02, 0.02)
PIECE = 1 << 18  # weights processed at a time, to stay within the CPU cache


def search_input_scales(
    weights: Sequence[Tensor], hessian: Tensor, mean: Tensor, grid: Grid
) -> tuple[Tensor, float, float, float]:
    """Search the input scales of layers [rows, columns] with the same input. Return (divisor of the inputs [columns],
    exponent, error without scaling, error with it).

    hessian: second moments of the inputs [columns, columns]; mean: of |x| [columns]; columns of the same mean have the
    same scale.
    """
    stacked, moments, mean = torch.cat(list(weights)).float(), hessian.float(), mean.float().clamp(min=1e-8)
    found: tuple[Tensor, float, float, float] | None = None
    first = 0.0
    for step in range(GRID_STEPS):
        power = step / GRID_STEPS
        scale = mean**power
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = compute_output_error(stacked, fake_quantize(stacked * scale, grid) / scale, moments)
        if step == 0:
            first = error
        if found is None or error < found[3]:
            found = (scale, power, first, error)
    assert found is not None
    return found


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest and dequantize."""
    groups = split_groups(weight, grid)
    scales = fit_scales(groups, grid)
    return dequantize_groups(quantize_groups(groups, scales, grid), scales).reshape(weight.shape)


def compute_output_error(before: Tensor, after: Tensor, moments: Tensor) -> float:
    """Return the sum over rows of the mean squared change of outputs."""
    residual = after - before
    return float(((residual @ moments) * residual).sum())


def search_clipping(weight: Tensor, hessian: Tensor, grid: Grid) -> Scales:
    """Return scales by the clipping ratio of each group's range that minimizes the group's output error (AWQ's
    clipping search): first among the ratios COARSE, then around the best of them by FINE.
    """
    groups = split_groups(weight, grid)
    size = groups.shape[-1]
    if grid.group == -1:
        raise ValueError("one scale of a whole matrix has no groups of columns")
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, weight.shape[1], size)]).float()
    found = [
        _search_clipping_rows(some, blocks, grid) for some in torch.split(groups, max(1, PIECE // weight.shape[1]))
    ]
    return Scales(torch.cat([one.scale for one in found]), torch.cat([one.zero for one in found]))


def _search_clipping_rows(groups: Tensor, blocks: Tensor, grid: Grid) -> Scales:
    """Search the scales of some rows: groups [rows, groups, size], moments of their inputs [groups, size, size]."""
    turned, ends = groups.transpose(0, 1).contiguous(), compute_extremes(groups, grid)
    best, least, share = (
        ends.compute_scales(grid),
        torch.full(groups.shape[:2], float("inf")),
        torch.ones(groups.shape[:2]),
    )
    residual = torch.empty_like(turned)

    def try_ratios(shares: Tensor) -> None:
        nonlocal best, least, share
        tried = ends.compute_scales(grid, shares)
        scale, zero = (one.T.contiguous()[..., None] for one in (tried.scale, tried.zero))
        torch.div(turned, scale, out=residual)
        if not grid.symmetric:
            residual.add_(zero)
        residual.round_().clamp_(grid.low, grid.high)
        if not grid.symmetric:
            residual.sub_(zero)
        residual.mul_(scale).sub_(turned)
        error = torch.bmm(residual, blocks).mul_(residual).sum(-1).T
        better = error < least
        best = Scales(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
        least, share = torch.where(better, error, least), torch.where(better, shares, share)

    for step in COARSE:
        try_ratios(torch.full_like(least, step))
    about = share
    for step in FINE:
        try_ratios((about + step).clamp(max=1.0))
    return best
