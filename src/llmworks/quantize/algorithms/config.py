"""Config fields of `quantize.mixed` and `quantize.rotate`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from llmworks.core.artifact import Config
from llmworks.quantize.config import KeptConfig


class MixedConfig(KeptConfig):
    """The budget, and what is chosen from."""

    bits: float = Field(4.25, gt=2, le=8.5, description="bits of a weight on average, scales included")
    bit_choices: list[int] = Field(
        [2, 3, 4, 5, 6, 8],
        min_length=2,
        description="bits that a part may have; layers that read the same have the same, as engines join them",
    )
    group_size: int = Field(64, ge=0, description="weights of a row that share a scale; 0: all of a row")
    symmetric: bool = Field(
        True, description="whole numbers around 0; else with a zero point, of the same bits, for each group"
    )
    num_calibration_samples: int = Field(128, gt=0, description="texts of `data` to calibrate by")
    sensitivity_samples: int = Field(8, gt=0, description="of these, texts by which costs are found")

    @field_validator("bit_choices")
    @classmethod
    def _whole(cls, choices: list[int]) -> list[int]:
        if not all(2 <= bits <= 8 for bits in choices) or len(set(choices)) < len(choices):
            raise ValueError("each must be from 2 to 8, and there once")
        return sorted(choices)


class RotateConfig(Config):
    """What is turned."""

    rotate_values: bool = Field(True, description="values, too, head by head")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="number format of the result, which is there to be quantized"
    )
