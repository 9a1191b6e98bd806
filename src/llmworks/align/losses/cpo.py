"""Contrastive preference optimization (CPO): pairs with a uniform reference; the NLL term is added by the caller.

Log-probabilities are summed over tokens; ipo takes their mean.

Xu et al. 2024 (arXiv:2401.08417, equation 3). TRL's `CPOTrainer` computes the same values.
"""

from __future__ import annotations

import torch

from llmworks.align.losses.dpo import sigmoid
from llmworks.align.losses.pair_logprobs import PairLogprobs, PairLoss


def cpo(
    pairs: PairLogprobs, loss_type: str = "sigmoid", *, beta: float = 0.1, label_smoothing: float = 0.0
) -> PairLoss:
    """Return the loss of each pair, without the NLL term."""
    chosen, rejected = pairs.mean_logprobs if loss_type == "ipo" else (pairs.chosen, pairs.rejected)
    difference = chosen - rejected
    loss = (
        (difference - 1 / (2 * beta)) ** 2
        if loss_type == "ipo"
        else torch.relu(1 - beta * difference)
        if loss_type == "hinge"
        else sigmoid(beta * difference, label_smoothing)
    )
    return PairLoss(loss, beta * chosen.detach(), beta * rejected.detach())
