"""Config fields of `quantize.gguf`, `quantize.imatrix` and `quantize.adapter`. Torch-free."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from llmworks.core.artifact import Config
from llmworks.quantize.llamacpp.types import FORMATS, FileType

BOUNDS = {"f32": 0.02, "f16": 0.05, "bf16": 0.3, "q8": 0.3, "q6": 0.8, "q5": 1.5, "q4": 3.0}


def bound_of(kind: str) -> float:
    """How far golden logits of a type may move on average; infinite for those of three bits and fewer."""
    return BOUNDS.get(kind if kind in BOUNDS else kind.removeprefix("i")[:2], float("inf"))


class GgufConfig(Config):
    """Which number formats, and what is looked at for them."""

    type: FileType = Field(
        "q8_0",
        description=(
            "type of the file, as llama.cpp names them: a mix of number formats of about so many bits a weight (q4_k_m,"
            " iq3_xs ...)"
        ),
    )
    tensor_types: dict[str, str] = Field(
        {},
        description=(
            'number formats of tensors by a pattern of their names, which go before the type\'s, as {"blk\\.0\\.":'
            ' "q8_0"}'
        ),
    )
    use_imatrix: bool = Field(
        True, description="formats are told what is important, where `data` is given (llama.cpp's importance matrix)"
    )
    allocate_bits: bool = Field(
        False,
        description=(
            "number formats by what each matrix would cost the model, within the size that the type has by itself;"
            " needs `data`"
        ),
    )
    sensitivity_samples: int = Field(8, gt=0, description="texts of `data` by which such costs are found")
    num_calibration_samples: int = Field(128, gt=0, description="texts of `data` that say what is important")
    eval_samples: int = Field(8, ge=0, description="other texts of `data`, on which model and file are compared")
    max_seq_length: int = Field(512, gt=1, le=2048, description="tokens of a text of `data`")

    @field_validator("type", mode="before")
    @classmethod
    def _small(cls, kind: object) -> object:
        return kind.lower() if isinstance(kind, str) else kind

    @field_validator("tensor_types")
    @classmethod
    def _known(cls, tensors: dict[str, str]) -> dict[str, str]:
        for pattern, kind in tensors.items():
            if kind.upper() not in FORMATS:
                raise ValueError(
                    f"{pattern}: {kind!r} is no number format of a tensor; known: {', '.join(sorted(FORMATS)).lower()}"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no pattern ({error})") from None
        return tensors


class ImatrixConfig(Config):
    """How much is looked at."""

    num_calibration_samples: int = Field(128, gt=0, description="texts of `data` that say what is important")
    sensitivity_samples: int = Field(
        8, ge=0, description="of these, texts by which costs of formats are found; 0: costs are not"
    )
    max_seq_length: int = Field(512, gt=1, le=2048, description="tokens of a text of `data`")


class AdapterConfig(Config):
    """The number format."""

    type: Literal["f32", "f16"] = Field("f16", description="number format of the adapter's matrices")
