"""Stage `align.online_dpo`: DPO on pairs sampled from the policy during training.

The best and the worst of the completions of a prompt are the pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineAlignmentConfig, run_online
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import RolloutObjective
    from llmworks.align.rl.sampling import RolloutSampler


class OnlineDpoConfig(OnlineAlignmentConfig):
    """Loss and KL strength of online DPO."""

    num_generations: int = Field(
        2, ge=2, le=256, description="completions sampled per prompt; the best and the worst become the pair"
    )
    loss_type: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="loss on the pair, as in align.dpo")
    beta: float = Field(0.1, gt=0, description="KL strength: higher keeps the policy closer to the initial policy")


def online_dpo(
    config: OnlineDpoConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
    reward_model: Model | None = None,
    judge: Model | Adapter | None = None,
) -> Adapter | Model:
    """Train the policy on pairs of its own completions (Guo et al. 2024, arXiv:2402.04792).

    Inputs and errors as in align.grpo.
    """

    def build_objective(context: MethodContext, sampler: RolloutSampler) -> RolloutObjective:
        from llmworks.align.rl.objective import OnlineDpoObjective

        return OnlineDpoObjective(
            context,
            sampler,
            loss_type=config.loss_type,
            beta=config.beta,
            train_on_truncated=not config.mask_truncated_completions,
        )

    return run_online(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        build_objective,
        "align.online_dpo",
        use_reference=True,
        reward_model=reward_model,
        judge=judge,
    )
