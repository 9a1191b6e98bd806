"""Stage `align.kto`: Kahneman-Tversky optimization.

Trains on single completions labeled desirable or undesirable; no pairs are needed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, prefer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.train.finetune.method import Way

SHARES = (1.0, 4 / 3)  # advised range of desirable_weight * count over undesirable_weight * count (KTO paper)


class KtoConfig(PreferenceConfig):
    """Loss, KL strength and class weights of KTO."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description=(
            "kto: rewards are measured from the mean KL divergence from the reference; apo-zero: from 0"
            " (arXiv:2408.06266)"
        ),
    )
    beta: float = Field(0.1, gt=0, description="KL strength: higher keeps the policy closer to the reference")
    desirable_weight: float = Field(
        1.0,
        gt=0,
        description=("loss weight of desirable completions; with imbalanced classes raise the weight of the rarer one"),
    )
    undesirable_weight: float = Field(1.0, gt=0, description="loss weight of undesirable completions")
    precompute_ref_log_probs: bool = Field(
        True,
        description=(
            "log-probabilities of the reference: cached: computed once before training; live: computed at every"
            " step with the adapter switched off"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.precompute_ref_log_probs and self.method != "lora":
            raise ValueError(
                "precompute_ref_log_probs live needs an adapter that can be switched off (method lora); with"
                " method full set it to cached"
            )
        return self


def kto(
    config: KtoConfig,
    policy: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    ref_model: Model | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on desirable and undesirable completions.

    `data`: conversations with a field `label`, or preference pairs, each split into one of both. `adapter`: the
    policy's adapter to continue training; its current weights are the reference. `ref_model`: another model as the
    reference.

    Errors: DataError when no completion can be used, or all have one label; UserError for a reference with another
    vocabulary; TrainingError when the loss is not finite.
    """
    if ref_model is not None and not config.precompute_ref_log_probs:
        raise UserError(
            "config.precompute_ref_log_probs live uses the initial policy as the reference; with the input"
            " `ref_model` set it to cached"
        )
    return prefer(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        functools.partial(way_of, config),
        "align.kto",
        reference=ref_model,
        singles=True,
    )


def way_of(config: KtoConfig, given: Given) -> Way:
    """Return the training method with this configuration's loss."""
    from llmworks.align.preference.objective import Singles

    good = sum(example.good for example in given.material.examples)
    bad = len(given.material.examples) - good
    if not good or not bad:
        raise DataError(
            f"all {good or bad} completions are {'desirable' if good else 'undesirable'}; both kinds are needed"
        )
    share = config.desirable_weight * good / (config.undesirable_weight * bad)
    if not SHARES[0] - 0.1 <= share <= SHARES[1] + 0.1:
        given.ctx.progress.say(
            f"warning: desirable completions weigh {share:.2f} times as much as undesirable ones ({good:,} and"
            f" {bad:,}); 1 to 1.33 is advised: set desirable_weight to {config.desirable_weight / share:.2g}, or"
            " undesirable_weight"
        )
    return Singles(
        given,
        beta=config.beta,
        good_weight=config.desirable_weight,
        bad_weight=config.undesirable_weight,
        measured=config.loss_type == "kto",
        live=not config.precompute_ref_log_probs,
    ).way()
