"""What all methods that round weights to whole numbers are told. Knows no tensor."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class KeptConfig(Config):
    """What is left as it is, and what the damage is measured on."""

    ignore: list[str] = Field(
        [], description="layers that stay as they are, by a part of their names, as self_attn.v_proj or layers.0."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description=(
            "number format of scales and of what is not quantized: embedding, head, norms; auto: bfloat16 where that"
            " changes no weight, else float16, float32 where a weight is beyond its range"
        ),
    )
    eval_samples: int = Field(
        8, ge=0, description="texts of `data` that are not calibrated by, on which model and result are compared"
    )
    max_seq_length: int = Field(512, gt=1, description="tokens of a text of `data`")


class QuantizeConfig(KeptConfig):
    """The numbers."""

    bits: int = Field(4, ge=2, le=8, description="of a whole number; engines know 4 and 8")
    group_size: int = Field(64, ge=0, description="weights of a row that share a scale; 0: all of a row")


class WholeConfig(QuantizeConfig):
    """And the form in which weights alone are whole numbers."""

    save_format: Literal["compressed-tensors", "gptq", "awq"] = Field(
        "compressed-tensors",
        description="layout of the files: any bits (transformers, vLLM); gptq: 2, 3, 4 or 8 bits; awq: 4 bits",
    )

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.bits not in {"gptq": (2, 3, 4, 8), "awq": (4,)}.get(self.save_format, (self.bits,)):
            raise ValueError(f"save_format: {self.save_format} has no layout for {self.bits} bits")
        if self.save_format != "compressed-tensors" and self.dtype not in ("auto", "float16"):
            raise ValueError(f"dtype: the form {self.save_format} keeps scales in float16")
        return self


class CalibratedConfig(QuantizeConfig):
    """And the texts that show what layers read."""

    num_calibration_samples: int = Field(128, gt=0, description="texts of `data` to calibrate by")


BOUNDS = {8: 0.3, 7: 0.5, 6: 0.8, 5: 1.5, 4: 3.0}
INPUTS = 1.0  # where what layers read is rounded, too; SmolLM2-135M moves by 0.3 in 8 bits of both


def allowed(bits: int, *, inputs: bool) -> float:
    """How far golden logits may move on average by rounding to so many bits; infinite for three and fewer."""
    return max(BOUNDS.get(bits, float("inf")), INPUTS if inputs else 0.0)
