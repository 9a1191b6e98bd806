"""Policy gradient losses over completions: advantages, importance ratios, clipping and loss aggregation.

Pure functions. GRPO: Shao et al. 2024 (arXiv:2402.03300); RLOO: Ahmadian et al. 2024 (arXiv:2402.14740); clipping:
Schulman et al. 2017 (arXiv:1707.06347). TRL's `GRPOTrainer` and `RLOOTrainer` compute the same values. Tokens are the
label tokens [n]; `owner` is the index of each one's completion.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["clip", "cispo", "sapo", "vespo"]
Mean = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"]
SMALL = 1e-4  # epsilon added to a standard deviation in a denominator


def group_advantages(rewards: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """Return group-relative advantages [prompts, completions]: reward minus the mean of its group.

    Completions without a reward (NaN) are ignored and get 0. `scale`: divide by the standard deviation of the group
    (GRPO), of the batch (REINFORCE++), or not (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783: dividing favors prompts
    that are too easy or too hard).
    """
    apart = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        apart = apart / ((deviation(rewards) if scale == "group" else deviation(rewards.view(1, -1))) + SMALL)
    return apart.nan_to_num(0.0)


def deviation(rewards: Tensor) -> Tensor:
    """Return the sample standard deviation of each row [rows, 1], ignoring NaN; 0 for fewer than two values."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    squares = ((rewards - rewards.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return RLOO advantages [prompts, completions]: reward minus the mean of the others of the same prompt.

    0 for a completion without a reward or without others.
    """
    there = ~rewards.isnan()
    count, total = there.sum(1, keepdim=True), rewards.nansum(1, keepdim=True)
    others = (total - rewards.nan_to_num(0.0)) / (count - 1).clamp(min=1)
    return torch.where(there & (count > 1), rewards.nan_to_num(0.0) - others, 0.0)


def overlong(lengths: Tensor, most: int, soft: int) -> Tensor:
    """Return DAPO's soft overlong penalty (Yu et al. 2025, arXiv:2503.14476, equation 13).

    0 up to `most` - `soft` tokens, then falling linearly to -1 at `most`.
    """
    return -((lengths - (most - soft)) / max(1, soft)).clamp(0, 1)


class Weighed(NamedTuple):
    """The loss of each token [n], and whether clipping removed its gradient."""

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
    """Return the log importance ratio of each token [n] to the sampling policy.

    Level answer: the mean over its completion (GSPO, Zheng et al. 2025, arXiv:2507.18071), or with `summed` the sum
    (RLOO).
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
    """Return the policy loss of each token, without the KL penalty. `advantages`: of each token [n].

    clip: PPO's, between 1 - `low` and 1 + `high` (DAPO: high above low); `ceiling`: upper bound of the ratio in any
    case (0: none). cispo: REINFORCE with ratios clipped at `high` (MiniMax 2025, arXiv:2506.13585). sapo: a soft gate
    (arXiv:2511.20347). vespo: a gamma-shaped weight of whole completions (arXiv:2602.10693).
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
        raise ValueError(f"unknown loss type {form!r}")
    held = ratio.clamp(1 - low, 1 + high)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    if ceiling:
        ratio = ratio.clamp(max=ceiling)
    return Weighed(-torch.min(ratio * advantages, held * advantages), clipped)


def _gamma(log_ratio: Tensor, advantages: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Return the VESPO weight e^l w^k e^(-l w) of each token's completion, w its importance ratio.

    k 2 and l 3 where the advantage is not negative, else k 3 and l 2.
    """
    whole = (
        log_ratio.new_zeros(len(counts)).index_add(0, owner, log_ratio.clamp(-20, 20)).clamp(math.log(1e-8), 20)[owner]
    )
    good = advantages >= 0
    k, scale = torch.where(good, 2.0, 3.0), torch.where(good, 3.0, 2.0)
    return torch.exp(scale + k * whole - scale * whole.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def distance(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return the per-token estimate of KL(policy || reference): r - log r - 1, never negative (k3, Schulman 2020)."""
    log = reference - logprobs
    return log.exp() - log - 1


def shares(owner: Tensor, counts: Tensor, mean: Mean, *, answers: int, tokens: int, longest: int) -> Tensor:
    """Return the loss weight of each token [n]; summed over all micro-batches of a step they give its loss times its
    completions.

    answer: mean per completion, whatever its length (GRPO). tokens: mean over tokens (DAPO). length: sum over tokens
    divided by the longest possible completion (Dr. GRPO: long wrong completions are not favored). sum: sum over the
    tokens of a completion. `answers`, `tokens`: counts of the whole step.
    """
    if mean == "seq-mean-token-mean":
        return 1.0 / counts.clamp(min=1)[owner]
    if mean == "token-mean":
        return torch.full_like(owner, answers / max(1, tokens), dtype=torch.float32)
    return torch.full_like(owner, 1.0 / longest if mean == "seq-mean-token-sum-norm" else 1.0, dtype=torch.float32)
