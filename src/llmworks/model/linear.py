"""The one kind of linear layer that is told apart: what it makes is added to the state that runs through all blocks."""

from __future__ import annotations

from torch import nn


class AddingLinear(nn.Linear):
    """A linear layer that begins smaller the more of it there are, so that the state does not grow with depth (GPT-2, section 2.3)."""
