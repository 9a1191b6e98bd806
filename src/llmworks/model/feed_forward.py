"""The feed-forward layer: what a token makes of what it attended to. Two matrices and a bend between them, or three with a gate; or many of them, by choice.

Functions of one token alone; knows no attention and no block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.model.linear import AddingLinear
from llmworks.model.shape import Shape

BENDS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu-tanh": lambda x: F.gelu(x, approximate="tanh")}


class FeedForward(nn.Module):
    """bend(x up) down, or with a gate: (bend(x gate) * x up) down (GLU variants, Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        bias = shape.bias == "all"
        self.bend = BENDS[shape.activation]
        self.gate = nn.Linear(shape.width, shape.inner, bias=bias) if shape.gated else None
        self.up = nn.Linear(shape.width, shape.inner, bias=bias)
        self.down = AddingLinear(shape.inner, shape.width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        made: Tensor = self.down(self.bend(self.up(x)) if self.gate is None else self.bend(self.gate(x)) * self.up(x))
        return made


class MixtureOfExperts(nn.Module):
    """Each token goes to the `chosen` experts that a router likes best, and gets their sum, weighed by the router's softmax over those chosen (Mixtral).

    `balance` after a forward pass is the load-balancing loss of Switch (section 2.2, eq. 4): count * sum over experts of
    (share of tokens) * (mean router probability); 1 when even.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.chosen = shape.experts.chosen
        self.router = nn.Linear(shape.width, shape.experts.count, bias=False)
        self.experts = nn.ModuleList(FeedForward(shape) for _ in range(shape.experts.count))
        self.balance: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> the same."""
        tokens = x.reshape(-1, x.shape[-1])
        chances = self.router(tokens).float().softmax(-1)  # [tokens, experts]
        weights, picked = chances.topk(self.chosen, dim=-1)  # [tokens, chosen]
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (picked == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        share = F.one_hot(picked, len(self.experts)).float().sum(1).mean(0) / self.chosen
        self.balance = len(self.experts) * (share * chances.mean(0)).sum()
        return out.view_as(x)
