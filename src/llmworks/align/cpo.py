"""Stage `align.cpo`: contrastive preference optimization.

As DPO without a reference, and the better answers are learned beside it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, prefer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.train.finetune.method import Way


class CpoConfig(PreferenceConfig):
    """Which loss, and how much is learned beside it."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="what is done with the difference of log-probabilities, which are summed over tokens"
    )
    beta: float = Field(0.1, gt=0, description="what the difference is multiplied by (ipo: tau)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="sigmoid: chance that a label is wrong")
    cpo_alpha: float = Field(
        1.0, ge=0, description="how much the chosen answers are learned beside it, in nats a token (alpha of the paper)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"smoothing is for loss sigmoid, not for {self.loss_type}")
        return self


def cpo(
    config: CpoConfig,
    policy: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on preference pairs; `adapter`: that it goes on from.

    Errors: DataError when no pair can be used; ArtifactError for an adapter of another model; TrainingError when the
    loss stops being a number.
    """
    return prefer(
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(way_of, config), "align.cpo"
    )


def way_of(config: CpoConfig, given: Given) -> Way:
    """The loss of this configuration, for a policy that is there."""
    from llmworks.align.losses.cpo import cpo as loss
    from llmworks.align.preference.objective import Pairs

    return Pairs(
        given,
        lambda sides: loss(sides, config.loss_type, beta=config.beta, smoothing=config.label_smoothing),
        compared=False,
        learn=config.cpo_alpha,
    ).way()
