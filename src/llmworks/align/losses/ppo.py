"""Proximal policy optimization (PPO): token rewards, generalized advantage estimation and value loss.

Pure functions. Schulman et al. 2017 (arXiv:1707.06347); GAE: Schulman et al. 2016 (arXiv:1506.02438), equation 16; for
language models: Ziegler et al. 2019 (arXiv:1909.08593), and Huang et al. 2024 (arXiv:2403.17031), whose implementation
details are followed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, owner: Tensor, *, kl: float) -> Tensor:
    """Return the reward of each token [n]: -`kl` times its log-ratio to the reference, plus the score at the last
    token.

    `scores`: [completions]. Tokens are in the order of their completions.
    """
    rewards = -kl * (logprobs - reference)
    lasts = torch.searchsorted(owner, torch.arange(len(scores), device=owner.device), right=True) - 1
    there = (lasts >= 0) & (owner[lasts.clamp(min=0)] == torch.arange(len(scores), device=owner.device))
    return rewards.index_add(0, lasts[there], scores[there].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, owner: Tensor, *, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of each token [n]: the sum of later TD errors, decayed by discount * trace per
    token.

    `trace`: GAE lambda. The value after a completion's last token is 0.
    """
    advantages = torch.zeros_like(rewards)
    later, place = 0.0, owner.tolist()
    reward, value = rewards.tolist(), values.tolist()
    for t in range(len(place) - 1, -1, -1):
        last = t + 1 == len(place) or place[t + 1] != place[t]
        surprise = reward[t] + (0.0 if last else discount * value[t + 1]) - value[t]
        later = surprise + (0.0 if last else discount * trace * later)
        advantages[t] = later
    return advantages, advantages + values


def whitened(x: Tensor, *, centred: bool = True) -> Tensor:
    """Scale to standard deviation 1 and mean 0, or keep the mean (`centred` false). Uses the population variance."""
    mean, variance = x.mean(), x.var(correction=0)
    made = (x - mean) * torch.rsqrt(variance + 1e-8)
    return made if centred else made + mean


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return the clipped value loss of each token [n].

    Half the larger of the squared errors of the value and of the value clipped around the old one.
    """
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)
