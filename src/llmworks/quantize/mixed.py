"""Stage `quantize.mixed`: whole numbers of more bits where a model bears least to lose them, so many on average; rounded by GPTQ.

In the manner of EXL2 (turboderp, exllamav2): what each part would cost at each number of bits is found first, then bits are given within the budget. The cost is what the divergence of the model would be, to second order.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from llmworks.artifact import Dataset, Model
from llmworks.context import Context
from llmworks.quantize.config import KeptConfig


class MixedConfig(KeptConfig):
    """The budget, and what is chosen from."""

    bits: float = Field(4.25, gt=2, le=8.5, description="bits of a weight on average, scales included")
    choices: list[int] = Field([2, 3, 4, 5, 6, 8], min_length=2, description="bits that a part may have; layers that read the same have the same, as engines join them")
    group: int = Field(64, ge=0, description="weights of a row that share a scale; 0: all of a row")
    symmetric: bool = Field(True, description="whole numbers around 0; else with a zero point, of the same bits, for each group")
    texts: int = Field(128, gt=0, description="texts of `data` to calibrate by")
    sensed: int = Field(8, gt=0, description="of these, texts by which costs are found")

    @field_validator("choices")
    @classmethod
    def _whole(cls, choices: list[int]) -> list[int]:
        if not all(2 <= bits <= 8 for bits in choices) or len(set(choices)) < len(choices):
            raise ValueError("each must be from 2 to 8, and there once")
        return sorted(choices)


def mixed(config: MixedConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in the form of compressed-tensors. Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the result computes something else; ModelError for a budget below the fewest bits."""
    from llmworks.quantize.mixing import run

    return run(config, model, ctx, data)
