"""Stage `quantize.int8`: LLM.int8(): weights and what they are multiplied by in 8 bits, but for the few inputs that are
large.

Dettmers et al. 2022 (arXiv:2208.07339). The large ones are found as they come, so that nothing has to be calibrated.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import QuantizeConfig


class Int8Config(QuantizeConfig):
    """What is large."""

    bits: Literal[8] = Field(8, description="of weights and of inputs")
    group_size: Literal[0] = Field(0, description="one scale for each row")
    llm_int8_threshold: float = Field(6.0, gt=0, description="inputs beyond it are multiplied in full precision")


def int8(config: Int8Config, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in the form of bitsandbytes; `data`: what the damage is measured on.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.activations import Reading
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.round_to_nearest import Nearest
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        Nearest(),
        Grid(8, 0, inputs=Reading(8, "last", config.llm_int8_threshold)),
        {"method": "int8"},
        "bitsandbytes-int8",
    )
