"""Half-quadratic quantization: zero points that make the errors of weights sparse, with nothing known of what layers read. Pure tensor functions.

Badri and Shaji 2023 (mobiusml.github.io/hqq_blog): min over z of |W - s (round(W / s + z) - z)|_p with p below 1, solved in turns for the errors W_e and for z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmworks.errors import ModelError
from llmworks.model.grid import Grid, Scales, Whole, fit, grouped, restored, rounded

SHARES = (1.0, 0.95, 0.9, 0.85)  # of a group's range that are tried
POWER = 0.7


def zeros(groups: Tensor, scales: Scales, grid: Grid, *, power: float = POWER, beta: float = 10.0, growth: float = 1.01, steps: int = 20) -> Scales:
    """Real zero points for groups [rows, groups, size] under given scales, until the mean error of all falls no more (the reference's own stop)."""
    best, least = scales, float("inf")
    now = scales
    for _ in range(steps):
        codes = rounded(groups, now, grid)
        apart = groups - restored(codes, now)
        error = float(apart.abs().mean())
        if error >= least:
            break
        best, least = now, error
        large = apart.abs()
        apart = apart.sign() * (large - large.clamp(min=1e-12) ** (power - 1) / beta).clamp(min=0)
        now = Scales(now.scale, (codes - (groups - apart) / now.scale[..., None]).mean(-1))
        beta *= growth
    codes = rounded(groups, now, grid)
    return now if float((groups - restored(codes, now)).abs().mean()) < least else best


def solve(weight: Tensor, grid: Grid) -> Whole:
    """Round a matrix [rows, columns] with zero points that are whole numbers, as files have them: of some ranges, each with its half-quadratic zero point, the one of least error |.|_p.

    Errors: ModelError for weights that are no numbers.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are no numbers (NaN or infinite)")
    groups = grouped(weight, grid)
    best = fit(groups, grid)
    least = loss(groups, best, grid)
    for share in SHARES:
        tried = fit(groups, grid, share)
        found = zeros(groups, tried, grid)
        tried = Scales(tried.scale, found.zero.round().clamp(grid.low, grid.high))
        error = loss(groups, tried, grid)
        better = error < least
        best = Scales(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
        least = torch.where(better, error, least)
    return Whole(rounded(groups, best, grid).reshape(weight.shape).to(torch.int8), best, grid)


def loss(groups: Tensor, scales: Scales, grid: Grid, power: float = POWER) -> Tensor:
    """The sum of |error|^p of each group [rows, groups]."""
    return (groups - restored(rounded(groups, scales, grid), scales)).abs().pow_(power).sum(-1)
