"""Stage `align.cpo`: contrastive preference optimization.

Like DPO without a reference model, plus a negative log-likelihood (NLL) loss on the chosen completions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, run_preference
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.train.finetune.method import TrainMethod


class CpoConfig(PreferenceConfig):
    """Loss of CPO and weight of its NLL term."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description=("loss on the log-probability difference (summed over tokens; ipo: means over tokens)")
    )
    beta: float = Field(0.1, gt=0, description="scale of the log-probability difference (ipo: tau)")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description=("label smoothing of loss sigmoid: probability that a preference label is flipped"),
    )
    cpo_alpha: float = Field(
        1.0, ge=0, description="CPO alpha: weight of the NLL loss on chosen completions, in nats per token"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is for loss_type sigmoid, not for {self.loss_type}")
        return self


def cpo(
    config: CpoConfig,
    policy: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on preference pairs without a reference model.

    `adapter`: the policy's adapter to continue training.

    Errors: DataError when no pair can be used; ArtifactError for an adapter of another model; TrainingError when the
    loss is not finite.
    """
    return run_preference(
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(build_method, config), "align.cpo"
    )


def build_method(config: CpoConfig, context: MethodContext) -> TrainMethod:
    """Return the training method with this configuration's loss."""
    from llmworks.align.losses.cpo import cpo as loss
    from llmworks.align.preference.objective import PairObjective

    return PairObjective(
        context,
        lambda sides: loss(sides, config.loss_type, beta=config.beta, label_smoothing=config.label_smoothing),
        use_reference=False,
        nll_weight=config.cpo_alpha,
    ).build_method()
