"""Simple preference optimization (SimPO): rewards are mean log-probabilities, with a target margin.

No reference model. Meng et al. 2024 (arXiv:2405.14734, equation 6). `alpha` reshapes the reward: AlphaPO (Gupta et al.
2025, arXiv:2501.03884). TRL's `CPOTrainer` computes the same values (loss_type simpo).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmworks.align.losses.dpo import sigmoid
from llmworks.align.losses.pair_logprobs import PairLogprobs, PairLoss


def alpha_reward(logprobs: Tensor, alpha: float) -> Tensor:
    """Return (1 - p^-alpha) / alpha of mean log-probabilities (AlphaPO); log p where alpha is 0."""
    return logprobs if not alpha else -torch.expm1(-alpha * logprobs) / alpha


def simpo(
    pairs: PairLogprobs, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0, alpha: float = 0.0
) -> PairLoss:
    """Return the loss of each pair.

    `gamma`: target reward margin, in units of the reward (beta times the mean log-probability).
    """
    chosen, rejected = (alpha_reward(mean, alpha) for mean in pairs.mean_logprobs)
    return PairLoss(
        sigmoid(beta * (chosen - rejected) - gamma, label_smoothing), beta * chosen.detach(), beta * rejected.detach()
    )
