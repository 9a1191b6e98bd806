"""Stage `quantize.smoothquant`: W8A8: weights and activations in 8 bits; outliers of activations are moved into the
weights before.

Xiao et al. 2022 (arXiv:2211.10438). Per-row weight scales, dynamic per-token activation scales.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig


class SmoothquantConfig(CalibratedConfig):
    """Config of `quantize.smoothquant`."""

    bits: Literal[8] = Field(8, description="bits of weights and activations")
    group_size: Literal[0] = Field(0, description="per-row scales")
    smoothing_strengths: list[float] = Field(
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        min_length=1,
        description=(
            "smoothing strength (alpha): how much of the activations' range is moved into the weights; the best of"
            " several is chosen for each part of each block"
        ),
    )


def smoothquant(config: SmoothquantConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in compressed-tensors format (W8A8).

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.activations import InputQuantization
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import SmoothQuantMethod
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        SmoothQuantMethod(config.num_calibration_samples, smoothing_strengths=config.smoothing_strengths),
        Grid(8, 0, inputs=InputQuantization()),
        {"method": "smoothquant"},
    )
