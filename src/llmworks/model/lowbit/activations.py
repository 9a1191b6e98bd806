"""Dynamic per-token quantization of layer inputs (activations), as in W8A8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """How a layer's inputs are quantized.

    `edge`: which integer the largest value maps to, as in `Grid`; `threshold`: larger values stay unquantized and do
    not count for the scale (outliers of LLM.int8(); 0 = none).
    """

    bits: int = 8
    edge: Literal["last", "between"] = "between"
    threshold: float = 0.0


def round_tokens(x: Tensor, reading: Reading) -> Tensor:
    """Quantize [..., columns] symmetrically per token, and dequantize.

    Each token is independent of the others in the batch.
    """
    high = (1 << (reading.bits - 1)) - 1
    large = x.abs()
    far = large > reading.threshold if reading.threshold else None
    if far is not None:
        large = large.masked_fill(far, 0)
    scale = (large.amax(-1, keepdim=True) / (high if reading.edge == "last" else high + 0.5)).clamp(
        min=torch.finfo(x.dtype).eps
    )
    made = (x / scale).round().clamp(-high - 1, high) * scale
    return made if far is None else torch.where(far, x, made)


def read_rounded(layer: nn.Module, reading: Reading) -> None:
    """Quantize the layer's inputs from now on, by a forward hook."""

    def rounding(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_tokens(given[0], reading), *given[1:])

    layer.register_forward_pre_hook(rounding)
