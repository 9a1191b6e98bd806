"""The one kind of linear layer that is told apart: what it makes is added to the state that runs through all blocks.

Computes as any other.
"""

from __future__ import annotations

from torch import nn


class AddingLinear(nn.Linear):
    """A marker: `begin` in decoder.py divides its first weights by the root of twice the layers, so that the state does
    not grow with depth (GPT-2, section 2.3).
    """
