"""Contrastive preference optimization (CPO): pairs with a uniform reference; the NLL term is added by the caller.

Log-probabilities are summed over tokens; ipo takes their mean.

Xu et al. 2024 (arXiv:2401.08417, equation 3). TRL's `CPOTrainer` computes the same values.
"""

from __future__ import annotations

import torch

from llmworks.align.losses.dpo import sigmoid
from llmworks.align.losses.sides import Judged, Sides


def cpo(sides: Sides, kind: str = "sigmoid", *, beta: float = 0.1, smoothing: float = 0.0) -> Judged:
    """Return the loss of each pair, without the NLL term."""
    chosen, rejected = sides.means if kind == "ipo" else (sides.chosen, sides.rejected)
    difference = chosen - rejected
    loss = (
        (difference - 1 / (2 * beta)) ** 2
        if kind == "ipo"
        else torch.relu(1 - beta * difference)
        if kind == "hinge"
        else sigmoid(beta * difference, smoothing)
    )
    return Judged(loss, beta * chosen.detach(), beta * rejected.detach())
