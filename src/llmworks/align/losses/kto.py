"""Kahneman-Tversky optimization (KTO): single completions, desirable or undesirable.

Each is measured from the mean KL divergence from the reference. Log-probabilities are summed over tokens.

Ethayarajh et al. 2024 (arXiv:2402.01306, equation 7). TRL's `KTOTrainer` computes the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each completion.

    `log_ratios` [completions]: log-ratios of policy to reference. `desirable` [completions]: whether each completion is
    desirable. `kl`: reference point in nats (0: unpaired APO).
    """
    toward = torch.where(desirable, log_ratios - kl, kl - log_ratios)
    return torch.where(desirable, desirable_weight, undesirable_weight) * (1 - torch.sigmoid(beta * toward))


def kl_estimate(log_ratios: Tensor) -> Tensor:
    """Return the KL estimate of policy from reference: the mean log-ratio of mismatched completions, clamped at 0.

    The completions belong to other prompts than their own. No gradient.
    """
    return log_ratios.detach().mean().clamp(min=0)
