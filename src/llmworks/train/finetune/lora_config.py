"""The fields of an adapter. Torch-free, so that recipes are checked without it; `model/lora/lora.py` computes it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class LoraConfig(Config):
    """The shape of the adapter, and how the frozen weights beside it are kept."""

    rank: int = Field(16, gt=0, description="rank of the added matrices")
    alpha: float = Field(32.0, gt=0, description="the addition is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="linear layers to adapt: all but the output head, or their last names, as q_proj"
    )
    stabilised: bool = Field(
        False, description="rsLoRA: scaled by alpha / sqrt(rank), so that large ranks learn as fast (arXiv:2312.03732)"
    )
    magnitudes: bool = Field(
        False,
        description="DoRA: the length of each row of the weights is learned beside its direction (arXiv:2402.09353)",
    )
    faster: float = Field(
        1.0, ge=1, description="LoRA+: how many times the learning rate B has, 16 is usual; 1: none (arXiv:2402.12354)"
    )
    base: Literal["as-is", "nf4"] = Field(
        "as-is",
        description=(
            "how frozen linear layers are kept: as they are, or in 4 bits (QLoRA, arXiv:2305.14314), an eighth of the"
            " memory of fp32"
        ),
    )
    double: bool = Field(True, description="nf4: the scales of blocks are kept in 8 bits, too")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.targets, list) and not self.targets:
            raise ValueError("targets is empty; name linear layers, or write all-linear")
        return self
