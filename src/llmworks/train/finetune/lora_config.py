"""LoRA config. Torch-free, so that recipes are checked without torch; `model/lora/lora.py` implements it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class LoraConfig(Config):
    """The adapter, and the precision of the frozen weights."""

    r: int = Field(16, gt=0, description="LoRA rank")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA alpha: the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description=(
            "linear layers to adapt: all except the LM head, or a list of their last name components, e.g. q_proj"
        ),
    )
    use_rslora: bool = Field(
        False, description="rsLoRA: scale by lora_alpha / sqrt(r), so that large ranks train as fast (arXiv:2312.03732)"
    )
    use_dora: bool = Field(
        False,
        description="DoRA: train a magnitude for each row of the weights beside its direction (arXiv:2402.09353)",
    )
    loraplus_lr_ratio: float = Field(
        1.0, ge=1, description="LoRA+: ratio of B's learning rate to A's; 16 is usual; 1 = off (arXiv:2402.12354)"
    )
    load_in_4bit: bool = Field(
        False,
        description=(
            "QLoRA: quantize the frozen linear layers to 4-bit NF4 (arXiv:2305.14314), an eighth of the memory of fp32"
        ),
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="QLoRA: double quantization, the block scales are quantized to 8 bits, too"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError("target_modules is empty; name linear layers, or write all-linear")
        return self
