"""Stage `align.rloo`: REINFORCE leave-one-out (RLOO).

The baseline of a completion's reward is the mean reward of the other completions of its prompt. The action is the
whole completion, not a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineAlignmentConfig, run_online
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import RolloutObjective
    from llmworks.align.rl.rollout import Rollout
    from llmworks.align.rl.sampling import RolloutSampler


class RlooConfig(OnlineAlignmentConfig):
    """Clipping and KL penalty of RLOO."""

    num_generations: int = Field(
        4, ge=2, le=256, description="completions sampled per prompt, each compared with the mean of the others"
    )
    epsilon: float = Field(
        0.2, gt=0, description=("clipping range of a completion's importance ratio: 1 - epsilon to 1 + epsilon")
    )
    beta: float = Field(
        0.05,
        ge=0,
        description=(
            "KL coefficient: reward penalty per nat of KL divergence from the initial policy; 0: not computed"
        ),
    )
    normalize_advantages: bool = Field(
        False, description=("normalize the advantages of a rollout batch to mean 0 and standard deviation 1")
    )


def rloo(
    config: RlooConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
    reward_model: Model | None = None,
    judge: Model | Adapter | None = None,
) -> Adapter | Model:
    """Train the policy on its own completions with a leave-one-out baseline.

    Inputs and errors as in align.grpo.
    """

    def build_objective(context: MethodContext, sampler: RolloutSampler) -> RolloutObjective:
        from llmworks.align.rl.objective import PolicyLossOptions, RolloutObjective

        objective = PolicyLossOptions(
            "clip",
            "seq-mean-token-mean",
            "sequence",
            True,
            config.epsilon,
            config.epsilon,
            train_on_truncated=not config.mask_truncated_completions,
        )
        return RolloutObjective(
            context,
            sampler,
            objective,
            lambda made: compute_advantages(made, config.beta, whiten=config.normalize_advantages),
            needs_old_logprobs=True,
        )

    return run_online(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        build_objective,
        "align.rloo",
        use_reference=config.beta > 0,
        reward_model=reward_model,
        judge=judge,
    )


def compute_advantages(rollout: Rollout, kl: float, *, whiten: bool) -> Tensor:
    """Return the advantages [prompts, completions]: rewards minus the KL penalty, minus the mean of the others.

    The KL divergence is estimated from the sampled tokens.
    """
    import torch

    from llmworks.align.losses.policy import EPSILON, leave_one_out

    rewards = rollout.rewards
    if kl:
        log_ratios = torch.tensor(
            [
                [sum(a - b for a, b in zip(one.old, one.reference, strict=True)) for one in group]
                for group in rollout.completions
            ]
        )
        rewards = rewards - kl * log_ratios
        rollout.metrics |= {
            "kl": float(log_ratios.sum()) / sum(len(one.ids) for group in rollout.completions for one in group)
        }
    advantages = leave_one_out(rewards)
    if whiten:
        known = advantages[~rewards.isnan()]
        advantages = torch.where(rewards.isnan(), 0.0, (advantages - known.mean()) / (known.std() + EPSILON))
    return advantages
