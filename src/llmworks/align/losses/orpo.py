"""Odds ratio preference optimization (ORPO): the log odds ratio of chosen over rejected, of mean log-probabilities.

No reference model. Hong et al. 2024 (arXiv:2403.07691, equations 6 and 7). TRL's `ORPOTrainer` computes the same
values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.align.losses.pair_logprobs import PairLogprobs, PairLoss

MAX_LOGPROB = -1e-6  # log-probability 0 has infinite odds


def log_odds(logprobs: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for log p below zero, with the accurate form of log(1 - p) (Maechler 2012)."""
    logprobs = logprobs.clamp(max=MAX_LOGPROB)
    near = logprobs > -0.693
    rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, logprobs, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, logprobs))),
    )
    return logprobs - rest


def orpo(pairs: PairLogprobs, *, weight: float = 0.1) -> PairLoss:
    """Return the odds-ratio part of each pair's loss. `weight`: lambda of the paper."""
    chosen, rejected = pairs.mean_logprobs
    return PairLoss(
        -weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected)),
        weight * chosen.detach(),
        weight * rejected.detach(),
    )
