"""Config shared by all methods that round weights to integers. Does not know tensors."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class BaseQuantizeConfig(Config):
    """Layers to ignore, the dtype of the rest, and the held-out samples for evaluation."""

    ignore: list[str] = Field(
        [], description="layers to leave unquantized, by a part of their names, e.g. self_attn.v_proj or layers.0."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description=(
            "dtype of scales and of unquantized tensors (embedding, head, norms); auto: bfloat16 if that changes no"
            " weight, otherwise float16, or float32 if a weight exceeds its range"
        ),
    )
    eval_samples: int = Field(
        8, ge=0, description="held-out sequences of `data` on which the original and the quantized model are compared"
    )
    max_seq_length: int = Field(512, gt=1, description="tokens of a sequence of `data`")


class QuantizeConfig(BaseQuantizeConfig):
    """Bit width and group size."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight; inference engines support 4 and 8")
    group_size: int = Field(64, ge=0, description="weights of a row that share a scale; 0: per-row scales")


class WeightFormatConfig(QuantizeConfig):
    """File format for weight-only integer quantization."""

    save_format: Literal["compressed-tensors", "gptq", "awq"] = Field(
        "compressed-tensors",
        description="file format; compressed-tensors: any bits (transformers, vLLM); gptq: 2, 3, 4 or 8 bits; awq: 4"
        " bits",
    )

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.bits not in {"gptq": (2, 3, 4, 8), "awq": (4,)}.get(self.save_format, (self.bits,)):
            raise ValueError(f"save_format: {self.save_format} does not support {self.bits} bits")
        if self.save_format != "compressed-tensors" and self.dtype not in ("auto", "float16"):
            raise ValueError(f"dtype: save_format {self.save_format} stores scales in float16")
        return self


class CalibratedConfig(QuantizeConfig):
    """Number of calibration samples."""

    num_calibration_samples: int = Field(128, gt=0, description="calibration sequences of `data`")


BOUNDS = {8: 0.3, 7: 0.5, 6: 0.8, 5: 1.5, 4: 3.0}
ACTIVATIONS_BOUND = 1.0  # if activations are quantized, too; SmolLM2-135M: 0.3 at W8A8


def max_gap_for_bits(bits: int, *, quantized_activations: bool) -> float:
    """Return the maximum mean change of golden logits for a bit width; infinite for three and fewer bits."""
    return max(BOUNDS.get(bits, float("inf")), ACTIVATIONS_BOUND if quantized_activations else 0.0)
