"""Proximal policy optimization (PPO): token rewards, generalized advantage estimation and value loss.

Pure functions. Schulman et al. 2017 (arXiv:1707.06347); GAE: Schulman et al. 2016 (arXiv:1506.02438), equation 16; for
language models: Ziegler et al. 2019 (arXiv:1909.08593), and Huang et al. 2024 (arXiv:2403.17031), whose implementation
details are followed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, owner: Tensor, *, kl_coef: float) -> Tensor:
    """Return the reward of each token [n]: -`kl_coef` times its log-ratio to the reference, plus the score at the last
    token.

    `scores`: [completions]. Tokens are in the order of their completions.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs)
    lasts = torch.searchsorted(owner, torch.arange(len(scores), device=owner.device), right=True) - 1
    has_tokens = (lasts >= 0) & (owner[lasts.clamp(min=0)] == torch.arange(len(scores), device=owner.device))
    return rewards.index_add(0, lasts[has_tokens], scores[has_tokens].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, owner: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of each token [n] by generalized advantage estimation (Schulman et al. 2015).

    An advantage is the sum of later TD errors, decayed by gamma * gae_lambda per token. The value after a completion's
    last token is 0.
    """
    advantages = torch.zeros_like(rewards)
    advantage, owners = 0.0, owner.tolist()
    reward, value = rewards.tolist(), values.tolist()
    for t in range(len(owners) - 1, -1, -1):
        last = t + 1 == len(owners) or owners[t + 1] != owners[t]
        td_error = reward[t] + (0.0 if last else gamma * value[t + 1]) - value[t]
        advantage = td_error + (0.0 if last else gamma * gae_lambda * advantage)
        advantages[t] = advantage
    return advantages, advantages + values


def whiten(x: Tensor, *, center: bool = True) -> Tensor:
    """Scale to standard deviation 1 and mean 0, or keep the mean (`center` false). Uses the population variance."""
    mean, variance = x.mean(), x.var(correction=0)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if center else scaled + mean


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Return the clipped value loss of each token [n].

    Half the larger of the squared errors of the value and of the value clipped around the old one.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
