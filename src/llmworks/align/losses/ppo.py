"""Proximal policy optimization beside what `policy.py` has: what each token of an answer is worth by a model of values,
learned at the same time.

Pure functions.

Schulman et al. 2017 (arXiv:1707.06347); estimates of advantages: Schulman et al. 2016 (arXiv:1506.02438), equation 16;
for language models: Ziegler et al. 2019 (arXiv:1909.08593), and Huang et al. 2024 (arXiv:2403.17031), whose details
these are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, owner: Tensor, *, kl: float) -> Tensor:
    """The reward of each token [n]: at the last token of an answer its score [answers], at all less `kl` times how much
    more probable the token is than to the reference.

    Tokens stand in the order of their answers.
    """
    rewards = -kl * (logprobs - reference)
    lasts = torch.searchsorted(owner, torch.arange(len(scores), device=owner.device), right=True) - 1
    there = (lasts >= 0) & (owner[lasts.clamp(min=0)] == torch.arange(len(scores), device=owner.device))
    return rewards.index_add(0, lasts[there], scores[there].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, owner: Tensor, *, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of each token [n]: the sum of later surprises, which fade by discount * trace a token;
    nothing follows an answer's last token.
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
    """To deviation 1, and mean 0 or the mean that it had. The variance is that of all of them, not of a sample."""
    mean, variance = x.mean(), x.var(correction=0)
    made = (x - mean) * torch.rsqrt(variance + 1e-8)
    return made if centred else made + mean


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the square of each token's error [n], the larger of that of the value and that of the value held near the
    old one.
    """
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)
