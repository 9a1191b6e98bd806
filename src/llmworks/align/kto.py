"""Stage `align.kto`: Kahneman-Tversky optimization.

Single answers, each known to be good or bad, become more or less probable than to the reference; no pairs are needed.
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

SHARES = (1.0, 4 / 3)  # of the weights times the counts of good and bad answers, as the paper has it


class KtoConfig(PreferenceConfig):
    """How far the policy may go, and what good and bad answers weigh."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description=(
            "kto: rewards are measured from the mean distance to the reference; apo-zero: from 0 (arXiv:2408.06266)"
        ),
    )
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    desirable_weight: float = Field(
        1.0, gt=0, description="of good answers; with many more of one kind the other should weigh more"
    )
    undesirable_weight: float = Field(1.0, gt=0, description="of bad answers")
    precompute_ref_log_probs: bool = Field(
        True,
        description=(
            "chances to the reference: computed once before training and kept, or beside every step with the adapter"
            " switched off"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.precompute_ref_log_probs and self.method != "lora":
            raise ValueError(
                "reference live needs an adapter that can be switched off (method lora); with method full the chances"
                " are computed once: cached"
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
    """Train the policy on answers that are good or bad: conversations with a field `label`, or preference pairs, each
    of which is one of both.

    `adapter`: that it goes on from, and as it is now the reference.

    Errors: DataError when no answer can be used, or all are of one kind; UserError for a reference with another
    vocabulary; TrainingError when the loss stops being a number.
    """
    if ref_model is not None and not config.precompute_ref_log_probs:
        raise UserError(
            "config.reference live is the policy as it began; with the input `reference` its chances are computed once:"
            " cached"
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
    """The loss of this configuration, for a policy that is there."""
    from llmworks.align.preference.objective import Singles

    good = sum(example.good for example in given.material.examples)
    bad = len(given.material.examples) - good
    if not good or not bad:
        raise DataError(f"all {good or bad} answers are {'good' if good else 'bad'}; both kinds are needed")
    share = config.desirable_weight * good / (config.undesirable_weight * bad)
    if not SHARES[0] - 0.1 <= share <= SHARES[1] + 0.1:
        given.ctx.progress.say(
            f"warning: good answers weigh {share:.2f} times what bad ones do ({good:,} and {bad:,}); 1 to 1.33 is"
            f" advised: set good_weight to {config.desirable_weight / share:.2g}, or bad_weight"
        )
    return Singles(
        given,
        beta=config.beta,
        good_weight=config.desirable_weight,
        bad_weight=config.undesirable_weight,
        measured=config.loss_type == "kto",
        live=not config.precompute_ref_log_probs,
    ).way()
