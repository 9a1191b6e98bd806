"""Stage `quantize.nf4`: bitsandbytes 4-bit weights: the nearest of 16 quantiles of a normal distribution (NF4), or of
15 floats (FP4).

Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3. Each block of 64 weights is quantized independently, so no
calibration is needed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import QuantizeConfig


class Nf4Config(QuantizeConfig):
    """Config of `quantize.nf4`."""

    bits: Literal[4] = Field(4, description="bits per weight")
    group_size: Literal[64] = Field(64, description="weights that share a scale")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4",
        description="quantiles of a normal distribution (nf4), or floats with 2 exponent bits and 1 mantissa bit (fp4)",
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="double quantization: scales in 8 bits, in blocks of 256 with a shared scale"
    )


def nf4(config: Nf4Config, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in bitsandbytes format; `data`: for the comparison with the original.

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.bnb_4bit import Bnb4bitGrid, quantize_4bit
    from llmworks.quantize.algorithms.round_to_nearest import RoundToNearest
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        RoundToNearest(quantize_4bit),
        Bnb4bitGrid(config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant),
        {"method": config.bnb_4bit_quant_type},
        "bitsandbytes-4bit",
    )
