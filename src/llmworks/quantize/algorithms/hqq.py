"""Half-quadratic quantization: zero points for a sparse weight error, without calibration data.

Pure tensor functions.

Badri and Shaji 2023 (mobiusml.github.io/hqq_blog): min over z of |W - s (round(W / s + z) - z)|_p with p below 1,
alternating between the errors W_e and z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import (
    Grid,
    IntegerMatrix,
    Scales,
    compute_extremes,
    dequantize_groups,
    quantize_groups,
    round_zero_points,
    split_groups,
)

POWER = 0.7
REFINE_ITERATIONS = 8  # iterations of fitting scales and zero points to codes, and codes to these
CLIPPING_RATIOS = (
    1.0,
    0.92,
    0.84,
)  # initial clipping ratios of a group's range: the iteration only finds a local optimum


def optimize_zero_points(
    groups: Tensor,
    scales: Scales,
    grid: Grid,
    *,
    power: float = POWER,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> Scales:
    """Optimize real zero points of groups [rows, groups, size] at given scales, until the mean error no longer falls
    (the reference's stopping rule).
    """
    best, least = scales, float("inf")
    now = scales
    for _ in range(steps):
        codes = quantize_groups(groups, now, grid)
        residual = groups - dequantize_groups(codes, now)
        error = float(residual.abs().mean())
        if error >= least:
            break
        best, least = now, error
        large = residual.abs()
        residual = residual.sign() * (large - large.clamp(min=1e-12) ** (power - 1) / beta).clamp(min=0)
        now = Scales(now.scale, (codes - (groups - residual) / now.scale[..., None]).mean(-1))
        beta *= growth
    codes = quantize_groups(groups, now, grid)
    return now if float((groups - dequantize_groups(codes, now)).abs().mean()) < least else best


def refine_scales(groups: Tensor, scales: Scales, grid: Grid) -> Scales:
    """Refit scales and zero points by least squares to the codes, repeatedly, for groups whose squared error falls
    by it (the reference keeps the scales).
    """
    least = _compute_group_errors(groups, scales, grid)
    mean = groups.mean(-1, keepdim=True)
    for _ in range(REFINE_ITERATIONS):
        codes = quantize_groups(groups, scales, grid)
        middle = codes.mean(-1, keepdim=True)
        scale = ((codes - middle) * (groups - mean)).sum(-1) / (codes - middle).square().sum(-1).clamp(min=1e-9)
        scale = scale.to(getattr(torch, grid.stored)).to(scale.dtype)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, scales.scale)
        tried = Scales(scale, round_zero_points(middle[..., 0] - mean[..., 0] / scale, grid))
        error = _compute_group_errors(groups, tried, grid)
        better = error < least
        if not better.any():
            break
        scales = Scales(torch.where(better, tried.scale, scales.scale), torch.where(better, tried.zero, scales.zero))
        least = torch.where(better, error, least)
    return scales


def quantize_hqq(weight: Tensor, grid: Grid) -> IntegerMatrix:
    """Round a matrix [rows, columns] with half-quadratic zero points, refined; or with refined smaller ranges: for each
    group the one of least squared error.

    All start from integer zero points, as the reference does with 4 bits: 0 is then nearly representable, around which
    most weights lie. Scales and zero points are rounded to their stored dtype before weights are rounded by them.
    ModelError for NaN or infinite weights.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are NaN or infinite")
    groups = split_groups(weight, grid)
    ends = compute_extremes(groups, grid)
    found: list[tuple[Scales, Tensor]] = []
    for share in CLIPPING_RATIOS:
        begun = ends.compute_scales(grid, share)
        begun = Scales(begun.scale, begun.zero.round())
        if share == 1:
            begun = Scales(begun.scale, round_zero_points(optimize_zero_points(groups, begun, grid).zero, grid))
        tried = refine_scales(groups, begun, grid)
        found.append((tried, _compute_group_errors(groups, tried, grid)))
    best = torch.stack([lost for _, lost in found]).argmin(0)[None]
    scales = Scales(
        *(
            torch.stack(kind).gather(0, best)[0]
            for kind in ([one.scale for one, _ in found], [one.zero for one, _ in found])
        )
    )
    return IntegerMatrix(quantize_groups(groups, scales, grid).reshape(weight.shape).to(torch.int8), scales, grid)


def _compute_group_errors(groups: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Return the squared error of each group [rows, groups]."""
    return (dequantize_groups(quantize_groups(groups, scales, grid), scales) - groups).square_().sum(-1)
