"""Stage `quantize.smoothquant`: weights and what they are multiplied by in 8 bits; what is large in a layer's inputs is
moved into its weights before.

Xiao et al. 2022 (arXiv:2211.10438). Weights have a scale for each row, inputs one for each token, found as they come.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig


class SmoothquantConfig(CalibratedConfig):
    """How much is moved."""

    bits: Literal[8] = Field(8, description="of weights and of inputs")
    group_size: Literal[0] = Field(0, description="one scale for each row")
    smoothing_strengths: list[float] = Field(
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        min_length=1,
        description=(
            "how much of the inputs' range weights take over (alpha); of several the best for each part of each block"
        ),
    )


def smoothquant(config: SmoothquantConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in the form of compressed-tensors (W8A8).

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.activations import Reading
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import Smooth
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        Smooth(config.num_calibration_samples, powers=config.smoothing_strengths),
        Grid(8, 0, inputs=Reading()),
        {"method": "smoothquant"},
    )
