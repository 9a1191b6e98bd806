"""Stage `align.grpo`: group relative policy optimization (GRPO).

Samples a group of completions per prompt and reinforces those with a reward above the group mean. Fields cover later
variants: DAPO, Dr. GRPO, GSPO, CISPO, SAPO, VESPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineAlignmentConfig, run_online
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import RolloutObjective
    from llmworks.align.rl.sampling import RolloutSampler


class GrpoConfig(OnlineAlignmentConfig):
    """Advantage scaling, loss aggregation and clipping of GRPO.

    GRPO: loss_aggregation seq-mean-token-mean, beta 0.04. Dr. GRPO: scale_rewards none, loss_aggregation
    seq-mean-token-sum-norm. DAPO: epsilon_high 0.28, dynamic_sampling_rounds, overlong_buffer,
    mask_truncated_completions. GSPO: importance_sampling_level sequence. loss_aggregation is named as in verl.
    """

    num_generations: int = Field(8, ge=2, le=256, description="completions sampled per prompt (group size)")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description=(
            "advantages are divided by the standard deviation of the rewards: of the group, or of the"
            " whole rollout batch; none: not divided (Dr. GRPO)"
        ),
    )
    loss_aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"] = (
        Field(
            "token-mean",
            description=(
                "seq-mean-token-mean: mean per completion (GRPO); token-mean: mean over all tokens (DAPO);"
                " seq-mean-token-sum-norm: sum over tokens divided by max_completion_length (Dr. GRPO);"
                " seq-mean-token-sum: sum over the tokens of a completion (LUSPO)"
            ),
        )
    )
    loss_type: Literal["clip", "cispo", "sapo", "vespo"] = Field(
        "clip",
        description=(
            "policy loss: clip (PPO's clipped ratio), cispo, sapo, vespo; align/losses/policy.py cites their papers"
        ),
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description=("importance ratio of each token, or of the whole completion (GSPO)")
    )
    epsilon: float = Field(0.2, gt=0, description="lower clipping range: the ratio is clipped at 1 - epsilon")
    epsilon_high: float = Field(
        0.2,
        gt=0,
        description=(
            "upper clipping range: the ratio is clipped at 1 + epsilon_high (DAPO: 0.28); cispo: the largest ratio"
        ),
    )
    delta: float = Field(0.0, ge=0, description=("upper bound of the ratio even for negative advantages (0: none)"))
    beta: float = Field(
        0.0, ge=0, description="weight of the KL penalty to the initial policy in the loss; 0: not computed"
    )
    use_bias_correction_kl: bool = Field(
        False, description="weight the KL estimate by the importance ratio (DeepSeek-V3.2)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_type == "cispo" and self.epsilon_high <= 1:
            raise ValueError(
                f"epsilon_high is the largest ratio of cispo, and {self.epsilon_high:g} would clip tokens whose"
                " probability has not changed; 5 is usual"
            )
        if self.use_bias_correction_kl and not self.beta:
            raise ValueError("use_bias_correction_kl corrects the KL penalty; set beta above 0")
        if self.delta and self.loss_type != "clip":
            raise ValueError(f"delta is for loss_type clip, not for {self.loss_type}")
        return self


def grpo(
    config: GrpoConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
    reward_model: Model | None = None,
    judge: Model | Adapter | None = None,
) -> Adapter | Model:
    """Train the policy on its own completions of the prompts of conversations.

    `adapter`: the policy's adapter to continue training; its current weights are the reference. `reward_model`: a
    model that scores completions. `judge`: a model that grades them.

    Errors: DataError for rows without a prompt or that cannot be scored; UserError for a reward function without its
    model or file; TrainingError when the loss is not finite.
    """

    def build_objective(context: MethodContext, sampler: RolloutSampler) -> RolloutObjective:
        from llmworks.align.losses.policy import group_advantages
        from llmworks.align.rl.objective import PolicyLossOptions, RolloutObjective

        objective = PolicyLossOptions(
            config.loss_type,
            config.loss_aggregation,
            config.importance_sampling_level,
            False,
            config.epsilon,
            config.epsilon_high,
            config.delta,
            config.beta,
            config.use_bias_correction_kl,
            not config.mask_truncated_completions,
        )
        return RolloutObjective(
            context, sampler, objective, lambda made: group_advantages(made.rewards, config.scale_rewards)
        )

    return run_online(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        build_objective,
        "align.grpo",
        use_reference=config.beta > 0,
        reward_model=reward_model,
        judge=judge,
    )
