"""Normalization: bring a token's state to unit size, then scale it by a learned gain. Functions of one token alone; knows no batch and no block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.model import kernels
from llmworks.model.shape import Shape


class RMSNorm(nn.Module):
    """x / rms(x) * gain (Zhang & Sennrich 2019, arXiv:1910.07467), computed in fp32. [..., width] -> [..., width].

    `from_zero`: the gain is 1 + weight (Gemma), so that weight decay pulls it to one.
    """

    def __init__(self, width: int, epsilon: float, *, from_zero: bool = False) -> None:
        super().__init__()
        self.epsilon, self.from_zero = epsilon, from_zero
        self.weight = nn.Parameter(torch.zeros(width) if from_zero else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        fused = kernels.rms_norm(x, self.weight, self.epsilon, from_zero=self.from_zero)
        if fused is not None:
            return fused
        if self.from_zero:
            return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.epsilon).to(x.dtype)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.epsilon).to(x.dtype) * self.weight


def norm_of(shape: Shape) -> nn.Module:
    """The normalization of a shape: LayerNorm (Ba et al. 2016, arXiv:1607.06450), which takes the mean away first and has a bias, or RMSNorm."""
    if shape.norm == "layer":
        return nn.LayerNorm(shape.width, shape.norm_epsilon)
    return RMSNorm(shape.width, shape.norm_epsilon, from_zero=shape.norm_from_zero)
