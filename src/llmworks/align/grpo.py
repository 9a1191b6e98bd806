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

    answers: int = Field(8, ge=2, le=256, description="answers that are drawn of each prompt, which are compared")
    scale: Literal["group", "batch", "none"] = Field(
        "group",
        description="what rewards are divided by: the deviation of their group, or of all of a draw; or not (Dr. GRPO)",
    )
    mean: Literal["answer", "tokens", "length", "sum"] = Field(
        "tokens",
        description=(
            "what counts alike: every answer (GRPO), every token (DAPO), every token of the longest possible answer"
            " (Dr. GRPO); sum: an answer as often as it has tokens (LUSPO)"
        ),
    )
    form: Literal["clip", "cispo", "sapo", "vespo"] = Field(
        "clip",
        description=(
            "how ratios are bounded: clip (PPO's), cispo, sapo, vespo; each with its source in align/losses/policy.py"
        ),
    )
    level: Literal["token", "answer"] = Field("token", description="ratios of each token, or of whole answers (GSPO)")
    clip: float = Field(0.2, gt=0, description="how far a ratio may fall below 1")
    clip_high: float = Field(
        0.2, gt=0, description="how far it may rise above 1 (DAPO: 0.28); of cispo the largest ratio"
    )
    ceiling: float = Field(0.0, ge=0, description="the largest ratio at all, also of answers that are worse (0: none)")
    kl: float = Field(
        0.0, ge=0, description="weight of the distance to the policy as it began, in the loss; 0: it is not computed"
    )
    unbiased: bool = Field(
        False, description="the distance is weighed by the ratio, as what was drawn is (DeepSeek-V3.2)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.form == "cispo" and self.clip_high <= 1:
            raise ValueError(
                f"clip_high is the largest ratio of cispo, and {self.clip_high:g} would cut off those of tokens that"
                " the policy has not moved; 5 is usual"
            )
        if self.unbiased and not self.kl:
            raise ValueError("unbiased is of the distance; set kl above 0")
        if self.ceiling and self.form != "clip":
            raise ValueError(f"ceiling is for form clip, not for {self.form}")
        return self


def grpo(
    config: GrpoConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    held_out: Dataset | None = None,
    reward: Model | None = None,
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
            config.form,
            config.mean,
            config.level,
            False,
            config.clip,
            config.clip_high,
            config.ceiling,
            config.kl,
            config.unbiased,
            config.cut == "learn",
        )
        return Groups(given, drawing, objective, lambda made: group_advantages(made.rewards, config.scale))

    return run(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        held_out,
        groups_of,
        "align.grpo",
        compared=config.kl > 0,
        reward=reward,
        judge=judge,
    )
