"""Config fields of `quantize.mixed` and `quantize.rotate`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from llmworks.core.artifact import Config
from llmworks.quantize.config import BaseQuantizeConfig


class MixedConfig(BaseQuantizeConfig):
    """Config of `quantize.mixed`."""

    bits: float = Field(4.25, gt=2, le=8.5, description="average bits per weight, scales included")
    bit_choices: list[int] = Field(
        [2, 3, 4, 5, 6, 8],
        min_length=2,
        description="candidate bit widths; layers with the same input get the same, as engines fuse them",
    )
    group_size: int = Field(64, ge=0, description="weights of a row that share a scale; 0: per-row scales")
    symmetric: bool = Field(
        True, description="symmetric integers around 0; otherwise with a zero point of the same bits for each group"
    )
    num_calibration_samples: int = Field(128, gt=0, description="calibration sequences of `data`")
    sensitivity_samples: int = Field(8, gt=0, description="how many of these are used to estimate costs")

    @field_validator("bit_choices")
    @classmethod
    def _whole(cls, choices: list[int]) -> list[int]:
        if not all(2 <= bits <= 8 for bits in choices) or len(set(choices)) < len(choices):
            raise ValueError("each must be from 2 to 8, without duplicates")
        return sorted(choices)


class RotateConfig(Config):
    """Config of `quantize.rotate`."""

    rotate_values: bool = Field(True, description="also rotate the value heads")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the result, which is meant to be quantized next"
    )
