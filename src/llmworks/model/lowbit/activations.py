"""Dynamic per-token quantization of layer inputs (activations), as in W8A8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputQuantization:
    """How a layer's inputs are quantized.

    `edge`: which integer the largest value maps to, as in `Grid`; `threshold`: larger values stay unquantized and do
    not count for the scale (outliers of LLM.int8(); 0 = none).
    """

    bits: int = 8
    edge: Literal["last", "between"] = "between"
    threshold: float = 0.0


def quantize_tokens(x: Tensor, quantization: InputQuantization) -> Tensor:
    """Quantize [..., columns] symmetrically per token, and dequantize.

    Each token is independent of the others in the batch.
    """
    high = (1 << (quantization.bits - 1)) - 1
    magnitude = x.abs()
    outliers = magnitude > quantization.threshold if quantization.threshold else None
    if outliers is not None:
        magnitude = magnitude.masked_fill(outliers, 0)
    scale = (magnitude.amax(-1, keepdim=True) / (high if quantization.edge == "last" else high + 0.5)).clamp(
        min=torch.finfo(x.dtype).eps
    )
    dequantized = (x / scale).round().clamp(-high - 1, high) * scale
    return dequantized if outliers is None else torch.where(outliers, x, dequantized)


def quantize_inputs(layer: nn.Module, quantization: InputQuantization) -> None:
    """Quantize the layer's inputs from now on, by a forward hook."""

    def round_inputs(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_tokens(given[0], quantization), *given[1:])

    layer.register_forward_pre_hook(round_inputs)
