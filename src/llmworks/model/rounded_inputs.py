"""Inputs of linear layers as whole numbers, too, each token's by its own largest: what a layer in 8 bits of both computes. Knows no method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """[..., columns] rounded to whole numbers around 0, and restored; the largest of a token lies between the last number and the next (compressed-tensors' dynamic scales)."""
    high = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(-1, keepdim=True) / (high + 0.5)).clamp(min=torch.finfo(x.dtype).eps)
    return (x / scale).round().clamp(-high - 1, high) * scale


def read_rounded(layer: nn.Module, bits: int) -> None:
    """From now on the layer reads rounded inputs."""

    def rounding(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_tokens(given[0], bits), *given[1:])

    layer.register_forward_pre_hook(rounding)
