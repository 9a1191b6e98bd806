"""Marker class for the linear layers whose output is added to the residual stream. Computes as `nn.Linear`."""

from __future__ import annotations

from torch import nn


class ResidualLinear(nn.Linear):
    """Linear layer into the residual stream: `init_weights` in decoder.py scales its initial weights.

    By 1 / sqrt(2 * layers), so that the residual stream does not grow with depth (GPT-2, section 2.3).
    """
