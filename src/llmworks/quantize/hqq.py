"""Stage `quantize.hqq`: weights as whole numbers with zero points such that few weights are far off, in place of all a
little; nothing has to be calibrated.

Badri and Shaji 2023, half-quadratic quantization (mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import QuantizeConfig


class HqqConfig(QuantizeConfig):
    """Which numbers the form has a place for."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="of a whole number")
    dtype: Literal["auto", "float16"] = Field(
        "auto",
        description="number format of scales, zero points and of what is not quantized: float16, as the form has it",
    )


def hqq(config: HqqConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in the form of the package hqq; `data`: what the damage is measured on.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.hqq import solve
    from llmworks.quantize.algorithms.round_to_nearest import Nearest
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        Nearest(solve),
        Grid(config.bits, config.group_size, symmetric=False, real=True),
        {"method": "hqq"},
        "hqq",
    )
