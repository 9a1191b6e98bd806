"""Inputs of linear layers as whole numbers, too, each token's by its own largest: what a layer in 8 bits of both
computes.

Knows no method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """How a layer's inputs are rounded.

    `edge`: where the largest comes to lie, as of a `Grid`; `threshold`: what is larger stays as it is, and does not
    count as the largest (0: nothing; LLM.int8()).
    """

    bits: int = 8
    edge: Literal["last", "between"] = "between"
    threshold: float = 0.0


def round_tokens(x: Tensor, reading: Reading) -> Tensor:
    """[..., columns] rounded to whole numbers around 0, and restored.

    Each token by itself, whatever is computed beside it.
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
    """From now on the layer reads rounded inputs."""

    def rounding(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_tokens(given[0], reading), *given[1:])

    layer.register_forward_pre_hook(rounding)
