"""Stage `align.ppo`: proximal policy optimization.

A head on the policy's states learns what each token is worth, and what does better than it expects becomes more
probable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineConfig, run
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.align.rl.objective import Groups
    from llmworks.align.rl.rollouts import Drawing


class PpoConfig(OnlineConfig):
    """How far a step may go, what holds the policy, and how values are learned."""

    num_generations: int = Field(1, ge=1, le=256, description="answers that are drawn of each prompt")
    batch_size: int = Field(16, gt=0, description="prompts, with all their answers, that are read at once")
    num_iterations: int = Field(4, gt=0, description="how often each draw is gone through")
    cliprange: float = Field(0.2, gt=0, description="how far a token's ratio may go from 1")
    kl_coef: float = Field(
        0.05,
        ge=0,
        description=(
            "what a nat's distance from the policy as it began takes from a token's reward; 0: it is not computed"
        ),
    )
    gamma: float = Field(1.0, gt=0, le=1, description="what a reward counts one token earlier (gamma)")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="how far surprises are carried back (lambda): 0: one token; 1: to the beginning"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the loss of values")
    cliprange_value: float = Field(
        0.2, gt=0, description="how far a value may go from what it was when answers were drawn"
    )
    normalize_advantages: bool = Field(True, description="advantages of a draw are brought to mean 0 and deviation 1")


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
    """Train the policy on its own answers to the questions of conversations. Inputs and errors as of align.grpo."""

    def groups_of(given: Given, drawing: Drawing) -> Groups:
        from llmworks.align.rl.objective import Actor, Objective

        objective = Objective(
            "clip",
            "token-mean",
            low=config.cliprange,
            high=config.cliprange,
            whole=not config.mask_truncated_completions,
        )
        return Actor(
            given,
            drawing,
            objective,
            reference_kl=config.kl_coef,
            discount=config.gamma,
            trace=config.gae_lambda,
            worth=config.vf_coef,
            held=config.cliprange_value,
            white=config.normalize_advantages,
        )

    return run(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        groups_of,
        "align.ppo",
        compared=config.kl_coef > 0,
        reward=reward_model,
        judge=judge,
    )
