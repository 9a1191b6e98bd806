"""Normalization layers: RMSNorm and LayerNorm, per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmworks.model.nn import kernels
from llmworks.model.shape import Shape


class _RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * gain; saves only x for the backward pass, not the normalized x too."""

    @staticmethod
    def forward(context: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        context.save_for_backward(x, gain)
        context.epsilon = epsilon
        return F.rms_norm(x.float(), (x.shape[-1],), None, epsilon).to(x.dtype) * gain

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute gradients: with n = x / rms, g = dy gain: dx = (g - n mean(g n)) / rms; dgain = sum(dy n)."""
        x, gain = context.saved_tensors
        inverse = x.float().square().mean(-1, keepdim=True).add_(context.epsilon).rsqrt_()
        n, by_y = x.float() * inverse, gradients[0].float()
        by_gain = (by_y * n).flatten(0, -2).sum(0)
        g = by_y * gain
        by_x = g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(inverse)
        return by_x.to(x.dtype), by_gain.to(gain.dtype), None


class RMSNorm(nn.Module):
    """RMSNorm: x / rms(x) * gain in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    [..., hidden_size] -> the same shape. `unit_offset`: the gain is 1 + weight (Gemma), so weight decay pulls it to
    one.
    """

    def __init__(self, width: int, epsilon: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.epsilon, self.unit_offset = epsilon, unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if unit_offset else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        fused = kernels.rms_norm(x, self.weight, self.epsilon, unit_offset=self.unit_offset)
        if fused is not None:
            return fused
        if self.unit_offset:
            return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.epsilon).to(x.dtype)
        if self.training and self.weight.requires_grad and torch.is_grad_enabled():
            y: Tensor = _RMSNormFunction.apply(x, self.weight, self.epsilon)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.epsilon).to(x.dtype) * self.weight


def make_norm(shape: Shape) -> nn.Module:
    """Create a shape's normalization layer: RMSNorm, or LayerNorm (Ba et al. 2016, arXiv:1607.06450) with bias."""
    if shape.norm == "layer":
        return nn.LayerNorm(shape.hidden_size, shape.norm_eps)
    return RMSNorm(shape.hidden_size, shape.norm_eps, unit_offset=shape.norm_unit_offset)
