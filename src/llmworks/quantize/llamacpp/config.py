"""Config fields of `quantize.gguf`, `quantize.imatrix` and `quantize.adapter`. Torch-free."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from llmworks.core.artifact import Config
from llmworks.quantize.llamacpp.types import FORMATS, FileType

BOUNDS = {"f32": 0.02, "f16": 0.05, "bf16": 0.3, "q8": 0.3, "q6": 0.8, "q5": 1.5, "q4": 3.0}


def max_gap_for_type(kind: str) -> float:
    """Return the maximum mean change of golden logits of a type; infinite for three and fewer bits."""
    return BOUNDS.get(kind if kind in BOUNDS else kind.removeprefix("i")[:2], float("inf"))


class GgufConfig(Config):
    """Config of `quantize.gguf`."""

    type: FileType = Field(
        "q8_0",
        description=(
            "file type in llama.cpp's naming: a mix of quantization formats with about this many bits per weight"
            " (q4_k_m, iq3_xs ...)"
        ),
    )
    tensor_types: dict[str, str] = Field(
        {},
        description=(
            'quantization formats by a regex on tensor names, overriding the type\'s, e.g. {"blk\\.0\\.": "q8_0"}'
        ),
    )
    use_imatrix: bool = Field(True, description="compute an importance matrix (llama.cpp's imatrix) if `data` is given")
    allocate_bits: bool = Field(
        False,
        description=(
            "allocate quantization formats by each matrix's sensitivity, within the size of the file type; requires"
            " `data`"
        ),
    )
    sensitivity_samples: int = Field(8, gt=0, description="sequences of `data` used to estimate the sensitivity")
    num_calibration_samples: int = Field(128, gt=0, description="sequences of `data` for the importance matrix")
    eval_samples: int = Field(
        8, ge=0, description="held-out sequences of `data` on which the model and the file are compared"
    )
    max_seq_length: int = Field(512, gt=1, le=2048, description="tokens of a sequence of `data`")

    @field_validator("type", mode="before")
    @classmethod
    def _small(cls, kind: object) -> object:
        return kind.lower() if isinstance(kind, str) else kind

    @field_validator("tensor_types")
    @classmethod
    def _check_types(cls, tensors: dict[str, str]) -> dict[str, str]:
        for pattern, kind in tensors.items():
            if kind.upper() not in FORMATS:
                raise ValueError(
                    f"{pattern}: {kind!r} is not a quantization format of a tensor; known:"
                    f" {', '.join(sorted(FORMATS)).lower()}"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a valid regex ({error})") from None
        return tensors


class ImatrixConfig(Config):
    """Config of `quantize.imatrix`."""

    num_calibration_samples: int = Field(128, gt=0, description="sequences of `data` for the importance matrix")
    sensitivity_samples: int = Field(
        8, ge=0, description="how many of these are used to estimate the cost of formats; 0: no estimate"
    )
    max_seq_length: int = Field(512, gt=1, le=2048, description="tokens of a sequence of `data`")


class GgufAdapterConfig(Config):
    """Config of `quantize.adapter`."""

    type: Literal["f32", "f16"] = Field("f16", description="dtype of the adapter's matrices")
