"""Kahneman-Tversky optimization: single answers, good or bad, each against the mean distance from the reference.

Log-probabilities are summed over tokens.

Ethayarajh et al. 2024 (arXiv:2402.01306, equation 7). TRL's `KTOTrainer` computes the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    ratios: Tensor,
    good: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Tensor:
    """The loss of each answer.

    ratios: log-probability less the reference's [answers]; good: whether it is wanted [answers]; kl: the distance that
    it is measured from, in nats (0: unpaired APO).
    """
    toward = torch.where(good, ratios - kl, kl - ratios)
    return torch.where(good, good_weight, bad_weight) * (1 - torch.sigmoid(beta * toward))


def distance(ratios: Tensor) -> Tensor:
    """The mean distance of the policy from the reference, of log-ratios of answers to other prompts than their own;
    never below zero, and no gradient.
    """
    return ratios.detach().mean().clamp(min=0)
