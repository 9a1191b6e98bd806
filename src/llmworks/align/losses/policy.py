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

LossType = Literal["clip", "cispo", "sapo", "vespo"]
LossAggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"]
EPSILON = 1e-4  # epsilon added to a standard deviation in a denominator


def group_advantages(rewards: Tensor, scale_rewards: Literal["group", "batch", "none"] = "group") -> Tensor:
    """Return group-relative advantages [prompts, completions]: reward minus the mean of its group.

    Completions without a reward (NaN) are ignored and get 0. `scale_rewards`: divide by the standard deviation of
    the group (GRPO), of the batch (REINFORCE++), or not (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783: dividing favors
    prompts that are too easy or too hard).
    """
    advantages = rewards - rewards.nanmean(1, keepdim=True)
    if scale_rewards != "none":
        advantages = advantages / (
            (standard_deviation(rewards) if scale_rewards == "group" else standard_deviation(rewards.view(1, -1)))
            + EPSILON
        )
    return advantages.nan_to_num(0.0)


def standard_deviation(rewards: Tensor) -> Tensor:
    """Return the sample standard deviation of each row [rows, 1], ignoring NaN; 0 for fewer than two values."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    squares = ((rewards - rewards.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return RLOO advantages [prompts, completions]: reward minus the mean of the others of the same prompt.

    0 for a completion without a reward or without others.
    """
    is_known = ~rewards.isnan()
    count, total = is_known.sum(1, keepdim=True), rewards.nansum(1, keepdim=True)
    others = (total - rewards.nan_to_num(0.0)) / (count - 1).clamp(min=1)
    return torch.where(is_known & (count > 1), rewards.nan_to_num(0.0) - others, 0.0)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Return DAPO's soft overlong penalty (Yu et al. 2025, arXiv:2503.14476, equation 13).

    0 up to `max_length` - `buffer` tokens, then falling linearly to -1 at `max_length`.
    """
    return -((lengths - (max_length - buffer)) / max(1, buffer)).clamp(0, 1)


class PolicyLoss(NamedTuple):
    """The loss of each token [n], and whether clipping removed its gradient."""

    loss: Tensor
    clipped: Tensor


def log_importance_ratios(
    logprobs: Tensor,
    old_logprobs: Tensor,
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
    log = logprobs - old_logprobs
    if level == "token":
        return log
    sequence_log_ratios = log.new_zeros(len(counts)).index_add(0, owner, log)
    return (sequence_log_ratios if summed else sequence_log_ratios / counts.clamp(min=1))[owner]


def policy_loss(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    owner: Tensor,
    counts: Tensor,
    *,
    loss_type: LossType = "clip",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float = 0.0,
) -> PolicyLoss:
    """Return the policy loss of each token, without the KL penalty. `advantages`: of each token [n].

    `loss_type` clip: PPO's, between 1 - `epsilon_low` and 1 + `epsilon_high` (DAPO: epsilon_high is the larger);
    `delta`: upper bound of the ratio in any case (0: none). cispo: REINFORCE with ratios clipped at `epsilon_high`
    (MiniMax 2025, arXiv:2506.13585). sapo: a soft gate (arXiv:2511.20347). vespo: a gamma-shaped weight of whole
    completions (arXiv:2602.10693).
    """
    ratio = log_ratio.exp()
    not_clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if loss_type == "cispo":
        return PolicyLoss(
            -ratio.clamp(max=epsilon_high).detach() * advantages * logprobs, (ratio > epsilon_high) & (advantages > 0)
        )
    if loss_type == "sapo":
        temperature = torch.where(advantages > 0, 1.0, 1.05)
        return PolicyLoss(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages, not_clipped)
    if loss_type == "vespo":
        return PolicyLoss(
            -_vespo_weight(log_ratio.detach(), advantages, owner, counts) * advantages * logprobs, not_clipped
        )
    if loss_type != "clip":
        raise ValueError(f"unknown loss type {loss_type!r}")
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    clipped = ((ratio < 1 - epsilon_low) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    if delta:
        ratio = ratio.clamp(max=delta)
    return PolicyLoss(-torch.min(ratio * advantages, clipped_ratio * advantages), clipped)


def _vespo_weight(log_ratio: Tensor, advantages: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Return the VESPO weight e^l w^k e^(-l w) of each token's completion, w its importance ratio.

    k 2 and l 3 where the advantage is not negative, else k 3 and l 2.
    """
    whole = (
        log_ratio.new_zeros(len(counts)).index_add(0, owner, log_ratio.clamp(-20, 20)).clamp(math.log(1e-8), 20)[owner]
    )
    good = advantages >= 0
    k, scale = torch.where(good, 2.0, 3.0), torch.where(good, 3.0, 2.0)
    return torch.exp(scale + k * whole - scale * whole.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the per-token estimate of KL(policy || reference): r - log r - 1, never negative (k3, Schulman 2020)."""
    log = ref_logprobs - logprobs
    return log.exp() - log - 1


def token_weights(
    owner: Tensor,
    counts: Tensor,
    aggregation: LossAggregation,
    *,
    num_completions: int,
    num_tokens: int,
    max_completion_length: int,
) -> Tensor:
    """Return the loss weight of each token [n]; summed over all micro-batches of a step they give its loss times its
    completions.

    seq-mean-token-mean: mean per completion, whatever its length (GRPO). token-mean: mean over tokens (DAPO).
    seq-mean-token-sum-norm: sum over tokens divided by the longest possible completion (Dr. GRPO: long wrong
    completions are not favored). seq-mean-token-sum: sum over the tokens of a completion. `num_completions`,
    `num_tokens`: counts of the whole step.
    """
    if aggregation == "seq-mean-token-mean":
        return 1.0 / counts.clamp(min=1)[owner]
    if aggregation == "token-mean":
        return torch.full_like(owner, num_completions / max(1, num_tokens), dtype=torch.float32)
    return torch.full_like(
        owner, 1.0 / max_completion_length if aggregation == "seq-mean-token-sum-norm" else 1.0, dtype=torch.float32
    )
