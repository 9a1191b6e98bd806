"""Stage `align.grpo`: answers to each prompt are drawn as a group, and what is better than the group's mean becomes
more probable.

With the corrections that were published since as fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy
from llmworks.align.rl.run import OnlineConfig, run
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.align.rl.objective import Groups
    from llmworks.align.rl.rollouts import Drawing


class GrpoConfig(OnlineConfig):
    """What an answer's tokens weigh, and how far a step may go.

    GRPO: the defaults with scale group, mean answer, kl 0.04; Dr. GRPO: scale none, mean length; DAPO: mean tokens,
    clip_high 0.28, fresh, soft, cut leave; GSPO: level answer.
    """

    num_generations: int = Field(
        8, ge=2, le=256, description="answers that are drawn of each prompt, which are compared"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="what rewards are divided by: the deviation of their group, or of all of a draw; or not (Dr. GRPO)",
    )
    loss_aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"] = (
        Field(
            "token-mean",
            description=(
                "what counts alike: every answer (GRPO), every token (DAPO), every token of the longest possible answer"
                " (Dr. GRPO); sum: an answer as often as it has tokens (LUSPO)"
            ),
        )
    )
    loss_type: Literal["clip", "cispo", "sapo", "vespo"] = Field(
        "clip",
        description=(
            "how ratios are bounded: clip (PPO's), cispo, sapo, vespo; each with its source in align/losses/policy.py"
        ),
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="ratios of each token, or of whole answers (GSPO)"
    )
    epsilon: float = Field(0.2, gt=0, description="how far a ratio may fall below 1")
    epsilon_high: float = Field(
        0.2, gt=0, description="how far it may rise above 1 (DAPO: 0.28); of cispo the largest ratio"
    )
    delta: float = Field(0.0, ge=0, description="the largest ratio at all, also of answers that are worse (0: none)")
    beta: float = Field(
        0.0, ge=0, description="weight of the distance to the policy as it began, in the loss; 0: it is not computed"
    )
    use_bias_correction_kl: bool = Field(
        False, description="the distance is weighed by the ratio, as what was drawn is (DeepSeek-V3.2)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_type == "cispo" and self.epsilon_high <= 1:
            raise ValueError(
                f"clip_high is the largest ratio of cispo, and {self.epsilon_high:g} would cut off those of tokens that"
                " the policy has not moved; 5 is usual"
            )
        if self.use_bias_correction_kl and not self.beta:
            raise ValueError("unbiased is of the distance; set kl above 0")
        if self.delta and self.loss_type != "clip":
            raise ValueError(f"ceiling is for form clip, not for {self.loss_type}")
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
    """Train the policy on its own answers to the questions of conversations.

    `adapter`: that it goes on from, and as it is now the reference; `reward`: a model that scores answers; `judge`: one
    that grades them.

    Errors: DataError for rows that cannot be asked or valued; UserError for a reward without its model or file;
    TrainingError when the loss stops being a number.
    """

    def groups_of(given: Given, drawing: Drawing) -> Groups:
        from llmworks.align.losses.policy import group_advantages
        from llmworks.align.rl.objective import Groups, Objective

        objective = Objective(
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
        return Groups(given, drawing, objective, lambda made: group_advantages(made.rewards, config.scale_rewards))

    return run(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        groups_of,
        "align.grpo",
        compared=config.beta > 0,
        reward=reward_model,
        judge=judge,
    )
