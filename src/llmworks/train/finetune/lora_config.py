"""The fields of an adapter. Torch-free, so that recipes are checked without it; `model/lora/lora.py` computes it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class LoraConfig(Config):
    """The shape of the adapter, and how the frozen weights beside it are kept."""

    r: int = Field(16, gt=0, description="rank of the added matrices")
    lora_alpha: float = Field(32.0, gt=0, description="the addition is scaled by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="linear layers to adapt: all but the output head, or their last names, as q_proj"
    )
    use_rslora: bool = Field(
        False, description="rsLoRA: scaled by alpha / sqrt(rank), so that large ranks learn as fast (arXiv:2312.03732)"
    )
    use_dora: bool = Field(
        False,
        description="DoRA: the length of each row of the weights is learned beside its direction (arXiv:2402.09353)",
    )
    loraplus_lr_ratio: float = Field(
        1.0, ge=1, description="LoRA+: how many times the learning rate B has, 16 is usual; 1: none (arXiv:2402.12354)"
    )
    load_in_4bit: bool = Field(
        False,
        description=(
            "how frozen linear layers are kept: as they are, or in 4 bits (QLoRA, arXiv:2305.14314), an eighth of the"
            " memory of fp32"
        ),
    )
    bnb_4bit_use_double_quant: bool = Field(True, description="nf4: the scales of blocks are kept in 8 bits, too")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError("targets is empty; name linear layers, or write all-linear")
        return self
