"""Stage `align.ppo`: proximal policy optimization (PPO).

A value head on the policy's hidden states predicts returns; advantages are estimated with GAE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineAlignmentConfig, run_online
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import RolloutObjective
    from llmworks.align.rl.sampling import RolloutSampler


class PpoConfig(OnlineAlignmentConfig):
    """Clipping, KL penalty, GAE and value loss of PPO."""

    num_generations: int = Field(1, ge=1, le=256, description="completions sampled per prompt")
    batch_size: int = Field(16, gt=0, description="prompts per micro-batch, with all their completions")
    num_iterations: int = Field(4, gt=0, description="PPO epochs: passes over each rollout batch")
    cliprange: float = Field(
        0.2, gt=0, description=("clipping range of a token's importance ratio: 1 - cliprange to 1 + cliprange")
    )
    kl_coef: float = Field(
        0.05,
        ge=0,
        description=(
            "KL coefficient: reward penalty per nat of KL divergence from the initial policy, per token; 0: not"
            " computed"
        ),
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount factor per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE lambda: 0 = one-step TD, 1 = Monte Carlo")
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    cliprange_value: float = Field(
        0.2, gt=0, description=("clipping range of the value prediction around its value at sampling time")
    )
    normalize_advantages: bool = Field(
        True, description=("normalize the advantages of a rollout batch to mean 0 and standard deviation 1")
    )


def ppo(
    config: PpoConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
    reward_model: Model | None = None,
    judge: Model | Adapter | None = None,
) -> Adapter | Model:
    """Train the policy on its own completions with a learned value function.

    Inputs and errors as in align.grpo.
    """

    def build_objective(context: MethodContext, sampler: RolloutSampler) -> RolloutObjective:
        from llmworks.align.rl.objective import PolicyLossOptions
        from llmworks.align.rl.ppo_objective import PpoObjective

        objective = PolicyLossOptions(
            "clip",
            "token-mean",
            epsilon_low=config.cliprange,
            epsilon_high=config.cliprange,
            train_on_truncated=not config.mask_truncated_completions,
        )
        return PpoObjective(
            context,
            sampler,
            objective,
            kl_coef=config.kl_coef,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            vf_coef=config.vf_coef,
            cliprange_value=config.cliprange_value,
            normalize_advantages=config.normalize_advantages,
        )

    return run_online(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        build_objective,
        "align.ppo",
        use_reference=config.kl_coef > 0,
        reward_model=reward_model,
        judge=judge,
    )
