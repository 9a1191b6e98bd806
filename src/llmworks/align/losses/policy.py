"""Losses of reinforcement learning from whole answers: what a token of an answer is worth, how far the policy may move
in a step, and what a step is the mean of.

Pure functions.

GRPO: Shao et al. 2024 (arXiv:2402.03300); RLOO: Ahmadian et al. 2024 (arXiv:2402.14740); clipping: Schulman et al. 2017
(arXiv:1707.06347). TRL's `GRPOTrainer` and `RLOOTrainer` compute the same numbers. Tokens are those that are weighed,
[n]; `owner` is the number of each one's answer.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["clip", "cispo", "sapo", "vespo"]
Mean = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"]
SMALL = 1e-4  # beside a deviation that is divided by


def group_advantages(rewards: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """How much better an answer is than the others to its prompt, [prompts, answers]; those without a reward (NaN)
    count for nothing and have 0.

    `scale`: by the deviation of the group (GRPO), of all (REINFORCE++), or not (Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783: dividing by it favours questions that are too easy or too hard).
    """
    apart = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        apart = apart / ((deviation(rewards) if scale == "group" else deviation(rewards.view(1, -1))) + SMALL)
    return apart.nan_to_num(0.0)


def deviation(rewards: Tensor) -> Tensor:
    """The sample deviation of each row [rows, 1], NaN left out; 0 of fewer than two."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    squares = ((rewards - rewards.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: a reward less the mean of the others to the same prompt, [prompts, answers]; 0 of one without a reward or
    without others.
    """
    there = ~rewards.isnan()
    count, total = there.sum(1, keepdim=True), rewards.nansum(1, keepdim=True)
    others = (total - rewards.nan_to_num(0.0)) / (count - 1).clamp(min=1)
    return torch.where(there & (count > 1), rewards.nan_to_num(0.0) - others, 0.0)


def overlong(lengths: Tensor, most: int, soft: int) -> Tensor:
    """DAPO's punishment of answers that come near the longest: 0 up to most - soft tokens, then down to -1 (Yu et al.
    2025, arXiv:2503.14476, equation 13).
    """
    return -((lengths - (most - soft)) / max(1, soft)).clamp(0, 1)


class Weighed(NamedTuple):
    """The loss of each token [n], and whether its gradient was cut off by clipping."""

    loss: Tensor
    clipped: Tensor


def ratios(
    logprobs: Tensor,
    old: Tensor,
    owner: Tensor,
    counts: Tensor,
    level: Literal["token", "sequence"],
    *,
    summed: bool = False,
) -> Tensor:
    """Log of how much more probable a token is than when it was drawn [n]; of level sequence the mean over its answer
    (GSPO, Zheng et al. 2025, arXiv:2507.18071), or the sum (RLOO).
    """
    log = logprobs - old
    if level == "token":
        return log
    whole = log.new_zeros(len(counts)).index_add(0, owner, log)
    return (whole if summed else whole / counts.clamp(min=1))[owner]


def weighed(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    owner: Tensor,
    counts: Tensor,
    *,
    form: Form = "clip",
    low: float = 0.2,
    high: float = 0.2,
    ceiling: float = 0.0,
) -> Weighed:
    """The loss of each token, before the distance to the reference. advantages: of each token [n].

    clip: PPO's, between 1 - low and 1 + high (DAPO: high above low); `ceiling`: the most that a ratio may be at all (0:
    none). cispo: REINFORCE with ratios up to `high` (MiniMax 2025, arXiv:2506.13585). sapo: a soft gate
    (arXiv:2511.20347). vespo: a gamma-shaped weight of whole answers (arXiv:2602.10693).
    """
    ratio = log_ratio.exp()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if form == "cispo":
        return Weighed(-ratio.clamp(max=high).detach() * advantages * logprobs, (ratio > high) & (advantages > 0))
    if form == "sapo":
        temperature = torch.where(advantages > 0, 1.0, 1.05)
        return Weighed(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages, never)
    if form == "vespo":
        return Weighed(-_gamma(log_ratio.detach(), advantages, owner, counts) * advantages * logprobs, never)
    if form != "clip":
        raise ValueError(f"no loss is called {form!r}")
    held = ratio.clamp(1 - low, 1 + high)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    if ceiling:
        ratio = ratio.clamp(max=ceiling)
    return Weighed(-torch.min(ratio * advantages, held * advantages), clipped)


def _gamma(log_ratio: Tensor, advantages: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """e^l w^k e^(-l w) of each token's answer, w its probability over that when it was drawn: k 2 and l 3 where the
    advantage is not negative, else 3 and 2.
    """
    whole = (
        log_ratio.new_zeros(len(counts)).index_add(0, owner, log_ratio.clamp(-20, 20)).clamp(math.log(1e-8), 20)[owner]
    )
    good = advantages >= 0
    k, scale = torch.where(good, 2.0, 3.0), torch.where(good, 3.0, 2.0)
    return torch.exp(scale + k * whole - scale * whole.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def distance(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of each token, as it is estimated from the token alone: r - log r - 1, never below zero
    (Schulman 2020, k3).
    """
    log = reference - logprobs
    return log.exp() - log - 1


def shares(owner: Tensor, counts: Tensor, mean: Mean, *, answers: int, tokens: int, longest: int) -> Tensor:
    """What each token counts [n], so that the sum over all of a step's parts is its loss times its answers.

    answer: each answer counts as much as another, whatever its length (GRPO). tokens: each token (DAPO). length: each
    token, over the most there could be (Dr. GRPO: long wrong answers are not spared).
    sum: an answer is the sum of its tokens. answers, tokens: of the whole step.
    """
    if mean == "seq-mean-token-mean":
        return 1.0 / counts.clamp(min=1)[owner]
    if mean == "token-mean":
        return torch.full_like(owner, answers / max(1, tokens), dtype=torch.float32)
    return torch.full_like(owner, 1.0 / longest if mean == "seq-mean-token-sum-norm" else 1.0, dtype=torch.float32)
