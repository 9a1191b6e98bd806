"""Stage `align.rloo`: REINFORCE, an answer's reward less the mean of the others to its prompt (leave one out).

Whole answers are what is chosen, not tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineConfig, run
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmworks.align.preference.objective import Given
    from llmworks.align.rl.experience import Rollout
    from llmworks.align.rl.objective import Groups
    from llmworks.align.rl.rollouts import Drawing


class RlooConfig(OnlineConfig):
    """How far a step may go, and what holds the policy."""

    num_generations: int = Field(
        4, ge=2, le=256, description="answers that are drawn of each prompt, each compared with the others"
    )
    epsilon: float = Field(0.2, gt=0, description="how far the ratio of an answer may go from 1")
    beta: float = Field(
        0.05,
        ge=0,
        description=(
            "what a nat's distance from the policy as it began takes from an answer's reward; 0: it is not computed"
        ),
    )
    normalize_advantages: bool = Field(False, description="advantages of a draw are brought to mean 0 and deviation 1")


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
    """Train the policy on its own answers to the questions of conversations. Inputs and errors as of align.grpo."""

    def groups_of(given: Given, drawing: Drawing) -> Groups:
        from llmworks.align.rl.objective import Groups, Objective

        objective = Objective(
            "clip",
            "seq-mean-token-mean",
            "sequence",
            True,
            config.epsilon,
            config.epsilon,
            whole=not config.mask_truncated_completions,
        )
        return Groups(
            given,
            drawing,
            objective,
            lambda made: advantages_of(made, config.beta, whiten=config.normalize_advantages),
            old=True,
        )

    return run(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        groups_of,
        "align.rloo",
        compared=config.beta > 0,
        reward=reward_model,
        judge=judge,
    )


def advantages_of(made: Rollout, kl: float, *, whiten: bool) -> Tensor:
    """[prompts, answers]: rewards, less kl times the distance that their tokens show, each less the mean of the
    others.
    """
    import torch

    from llmworks.align.losses.policy import SMALL, leave_one_out

    rewards = made.rewards
    if kl:
        away = torch.tensor(
            [[sum(a - b for a, b in zip(one.old, one.reference, strict=True)) for one in group] for group in made.drawn]
        )
        rewards = rewards - kl * away
        made.figures |= {"kl": float(away.sum()) / sum(len(one.ids) for group in made.drawn for one in group)}
    found = leave_one_out(rewards)
    if whiten:
        known = found[~rewards.isnan()]
        found = torch.where(rewards.isnan(), 0.0, (found - known.mean()) / (known.std() + SMALL))
    return found
