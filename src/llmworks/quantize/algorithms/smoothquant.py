"""SmoothQuant: move activation outliers, which are hard to quantize, into the weights.

Pure tensor functions.

Xiao et al. 2022 (arXiv:2211.10438), equation 4: s = max|x|^a / max|w|^(1 - a) for each column; a is searched for each
part of a block, by its output error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmworks.model.lowbit.activations import InputQuantization, quantize_tokens
from llmworks.model.lowbit.integer import Grid
from llmworks.quantize.algorithms.awq import fake_quantize

SMOOTHING_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def search_smoothing_scales(
    weights: Sequence[Tensor],
    sample: Tensor,
    max_abs: Tensor,
    grid: Grid,
    reading: InputQuantization,
    smoothing_strengths: Sequence[float] = SMOOTHING_STRENGTHS,
    shared: Callable[[Tensor], Tensor | None] = lambda columns: columns,
) -> tuple[Tensor, float, float, float]:
    """Search the smoothing scales of layers [rows, columns] with the same input. Return (divisor of the inputs
    [columns], exponent, error without smoothing, error with it).

    sample: some inputs [tokens, columns]; max_abs: the largest |x| of each column [columns]; `shared`: reduces columns
    that can only be scaled together to one value. The exponent is 0 where no scaling helps.
    """
    stacked = torch.cat(list(weights)).float()
    wanted = sample @ stacked.T
    first = float((quantize_tokens(sample, reading) @ fake_quantize(stacked, grid).T - wanted).square().sum())
    best: tuple[Tensor, float, float, float] = (torch.ones_like(max_abs), 0.0, first, first)
    together = shared(stacked.abs().amax(0))
    assert together is not None
    columns = together.clamp(min=1e-8)
    for power in smoothing_strengths:
        scale = max_abs.clamp(min=1e-8) ** power / columns ** (1 - power)
        scale = (scale / scale.log().mean().exp()).clamp(1e-3, 1e3)
        error = float(
            (quantize_tokens(sample / scale, reading) @ fake_quantize(stacked * scale, grid).T - wanted).square().sum()
        )
        if error < best[3]:
            best = (scale, power, first, error)
    return best
