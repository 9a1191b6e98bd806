"""Stage `align.kto`: Kahneman-Tversky optimization.

Trains on single completions labeled desirable or undesirable; no pairs are needed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, run_preference
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.train.finetune.method import TrainMethod

ADVISED_WEIGHT_RATIO = (
    1.0,
    4 / 3,
)  # advised range of desirable_weight * count over undesirable_weight * count (KTO paper)


class KtoConfig(PreferenceConfig):
    """Loss, KL strength and class weights of KTO."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description=(
            "kto: rewards are measured from the mean KL divergence from the reference; apo_zero_unpaired: from 0"
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
            "compute the reference model's log-probabilities once before training; false: at every step, with the"
            " adapter switched off"
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
    return run_preference(
        config,
        Policy(policy, adapter),
        data,
        ctx,
        eval_data,
        functools.partial(build_method, config),
        "align.kto",
        ref_model=ref_model,
        single_completions=True,
    )


def build_method(config: KtoConfig, context: MethodContext) -> TrainMethod:
    """Return the training method with this configuration's loss."""
    from llmworks.align.preference.objective import KtoObjective

    num_desirable = sum(example.desirable for example in context.material.examples)
    num_undesirable = len(context.material.examples) - num_desirable
    if not num_desirable or not num_undesirable:
        raise DataError(
            f"all {num_desirable or num_undesirable} completions are"
            f" {'desirable' if num_desirable else 'undesirable'}; both kinds are needed"
        )
    weight_ratio = config.desirable_weight * num_desirable / (config.undesirable_weight * num_undesirable)
    if not ADVISED_WEIGHT_RATIO[0] - 0.1 <= weight_ratio <= ADVISED_WEIGHT_RATIO[1] + 0.1:
        context.ctx.progress.log(
            f"warning: desirable completions weigh {weight_ratio:.2f} times as much as undesirable ones"
            f" ({num_desirable:,} and"
            f" {num_undesirable:,}); 1 to 1.33 is advised: set desirable_weight to"
            f" {config.desirable_weight / weight_ratio:.2g}, or"
            " undesirable_weight"
        )
    return KtoObjective(
        context,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        use_kl=config.loss_type == "kto",
        live_reference=not config.precompute_ref_log_probs,
    ).build_method()
