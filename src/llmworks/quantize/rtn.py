"""Stage `quantize.rtn`: round-to-nearest (RTN): round each weight to the nearest integer of a range.

Absmax: symmetric, the largest weight of a group at the end of the range. Zero point: from the smallest to the largest
weight of a group, 0 being representable.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import WeightFormatConfig


class RtnConfig(WeightFormatConfig):
    """Config of `quantize.rtn`."""

    symmetric: bool = Field(
        True, description="absmax: symmetric integers around 0; otherwise with a zero point for each group"
    )
    mse_scales: bool = Field(
        False, description="choose ranges of least squared error, instead of the smallest and largest weights"
    )


def rtn(config: RtnConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in compressed-tensors, GPTQ or AWQ format (`save_format`); `data`: for the comparison with the
    original.

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid, quantize_matrix
    from llmworks.quantize.algorithms.round_to_nearest import RoundToNearest, quantize_with_mse_scales
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        RoundToNearest(quantize_with_mse_scales if config.mse_scales else quantize_matrix),
        Grid(config.bits, config.group_size, symmetric=config.symmetric),
        {"method": "absmax" if config.symmetric else "zeropoint"},
        config.save_format,
    )
