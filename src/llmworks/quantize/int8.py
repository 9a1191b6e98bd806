"""Stage `quantize.int8`: LLM.int8(): weights and activations in 8 bits, except for outlier input columns, which are
multiplied in full precision.

Dettmers et al. 2022 (arXiv:2208.07339). Outliers are detected at inference, so no calibration is needed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import QuantizeConfig


class Int8Config(QuantizeConfig):
    """Config of `quantize.int8`."""

    bits: Literal[8] = Field(8, description="bits of weights and activations")
    group_size: Literal[0] = Field(0, description="per-row scales")
    llm_int8_threshold: float = Field(
        6.0, gt=0, description="outlier threshold: larger activations are multiplied in full precision"
    )


def int8(config: Int8Config, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in bitsandbytes format; `data`: for the comparison with the original.

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.activations import InputQuantization
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.round_to_nearest import RoundToNearest
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        RoundToNearest(),
        Grid(8, 0, inputs=InputQuantization(8, "last", config.llm_int8_threshold)),
        {"method": "int8"},
        "bitsandbytes-int8",
    )
