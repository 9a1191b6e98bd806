"""Odds ratio preference optimization: chosen answers are learned, and their odds over the rejected ones' are raised, of
mean log-probabilities.

No reference.

Hong et al. 2024 (arXiv:2403.07691, equations 6 and 7). TRL's `ORPOTrainer` computes the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.align.losses.sides import Judged, Sides

NEVER = -1e-6  # log-probabilities of nothing else at all have no odds


def log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p below zero; of both forms of log(1 - p) the one that is exact there (Maechler 2012)."""
    means = means.clamp(max=NEVER)
    near = means > -0.693
    rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, means, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, means))),
    )
    return means - rest


def orpo(sides: Sides, *, weight: float = 0.1) -> Judged:
    """The part of each pair's loss that is of odds; `weight`: lambda of the paper."""
    chosen, rejected = sides.means
    return Judged(
        -weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected)),
        weight * chosen.detach(),
        weight * rejected.detach(),
    )
