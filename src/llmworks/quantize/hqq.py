"""Stage `quantize.hqq`: half-quadratic quantization (HQQ): optimize zero points for a sparse error, a few weights far
off instead of all a little; needs no calibration.

Badri and Shaji 2023 (mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import QuantizeConfig


class HqqConfig(QuantizeConfig):
    """Config of `quantize.hqq`: what the format supports."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    dtype: Literal["auto", "float16"] = Field(
        "auto",
        description="dtype of scales, zero points and unquantized tensors: float16, as the format requires",
    )


def hqq(config: HqqConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in the format of the package hqq; `data`: for the comparison with the original.

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.hqq import quantize_hqq
    from llmworks.quantize.algorithms.round_to_nearest import RoundToNearest
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        RoundToNearest(quantize_hqq),
        Grid(config.bits, config.group_size, symmetric=False, real_zero_points=True),
        {"method": "hqq"},
        "hqq",
    )
