"""Kahneman-Tversky optimization (KTO): single completions, desirable or undesirable.

Each is measured from the mean KL divergence from the reference. Log-probabilities are summed over tokens.

Ethayarajh et al. 2024 (arXiv:2402.01306, equation 7). TRL's `KTOTrainer` computes the same values.
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
    """Return the loss of each completion.

    ratios: log-ratios of policy to reference [completions]; good: whether it is desirable [completions]; kl: reference
    point in nats (0: unpaired APO).
    """
    toward = torch.where(good, ratios - kl, kl - ratios)
    return torch.where(good, good_weight, bad_weight) * (1 - torch.sigmoid(beta * toward))


def distance(ratios: Tensor) -> Tensor:
    """Return the KL estimate of policy from reference: the mean log-ratio of mismatched completions, clamped at 0.

    The completions belong to other prompts than their own. No gradient.
    """
    return ratios.detach().mean().clamp(min=0)
