"""Stage `align.dpo`: direct preference optimization (DPO) and its loss variants.

Raises the probability of the chosen completion over the rejected one, with an implicit KL penalty to the reference.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, run_preference
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.train.finetune.method import TrainMethod

SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # losses that take label smoothing
LOG_RATIO_LOSSES = (
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "aot",
    "aot_unpaired",
)  # losses without an f-divergence


class DpoConfig(PreferenceConfig):
    """Loss variant of DPO and KL strength."""

    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
        "aot",
        "aot_unpaired",
    ] = Field(
        "sigmoid",
        description=(
            "sigmoid: DPO, with label_smoothing cDPO; ipo and sigmoid_norm take means over tokens; the others are"
            " named as in their papers, which align/losses/dpo.py cites"
        ),
    )
    beta: float = Field(
        0.1, gt=0, description=("KL strength: higher keeps the policy closer to the reference (ipo: tau)")
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description=(
            f"label smoothing: probability that a preference label is flipped; for {', '.join(SMOOTHED_LOSSES)}"
        ),
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl",
        description=(
            "f-divergence between policy and reference: reverse KL is DPO; the others are f-DPO (arXiv:2309.16240)"
        ),
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha of the alpha-divergence")
    ld_alpha: float = Field(
        1.0,
        ge=0,
        le=1,
        description=(
            "LD-DPO alpha: weight of the tokens beyond the length of the shorter completion of a pair; below 1"
            " reduces length bias (arXiv:2409.06411)"
        ),
    )
    rpo_alpha: float = Field(
        0.0,
        ge=0,
        description=(
            "RPO alpha: weight of an NLL loss on chosen completions, in nats per token; 1 is usual (arXiv:2404.19733)"
        ),
    )
    precompute_ref_log_probs: bool = Field(
        True,
        description=(
            "compute the reference model's log-probabilities once before training; false: at every step, with the"
            " adapter switched off"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.label_smoothing and self.loss_type not in SMOOTHED_LOSSES:
            raise ValueError(f"label_smoothing is for loss_type {', '.join(SMOOTHED_LOSSES)}, not for {self.loss_type}")
        if self.loss_type in ("exo_pair",) and not self.label_smoothing:
            raise ValueError(
                "loss_type exo needs label_smoothing above 0, such as 0.001: its formula has the logarithm of it"
            )
        if self.f_divergence_type != "reverse_kl" and self.loss_type in LOG_RATIO_LOSSES:
            raise ValueError(
                f"f_divergence_type is not for loss_type {self.loss_type}, which takes log-ratios unchanged"
            )
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ValueError("f_alpha_divergence_coef is for f_divergence_type alpha")
        if self.loss_type.startswith("aot") and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"loss_type {self.loss_type} compares all pairs of a step; set gradient_accumulation_steps to 1 and"
                " batch_size to the pairs per step"
            )
        if not self.precompute_ref_log_probs and self.method != "lora":
            raise ValueError(
                "precompute_ref_log_probs live needs an adapter that can be switched off (method lora); with"
                " method full set it to cached"
            )
        return self


def dpo(
    config: DpoConfig,
    policy: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    ref_model: Model | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on preference pairs against a reference.

    `adapter`: the policy's adapter to continue training; its current weights are the reference. `ref_model`: another
    model as the reference.

    Errors: DataError when no pair can be used; UserError for a reference with another vocabulary; ArtifactError for an
    adapter of another model; TrainingError when the loss is not finite.
    """
    if ref_model is not None and not config.precompute_ref_log_probs:
        raise UserError(
            "config.precompute_ref_log_probs live uses the initial policy as the reference; with the input"
            " `ref_model` set it to cached"
        )
    return run_preference(
        config,
        Policy(policy, adapter),
        pairs,
        ctx,
        eval_data,
        functools.partial(build_method, config),
        "align.dpo",
        ref_model=ref_model,
    )


def build_method(config: DpoConfig, context: MethodContext) -> TrainMethod:
    """Return the training method with this configuration's loss."""
    from llmworks.align.losses.dpo import dpo as loss
    from llmworks.align.preference.objective import PairObjective

    options = {
        "beta": config.beta,
        "label_smoothing": config.label_smoothing,
        "divergence": config.f_divergence_type,
        "alpha": config.f_alpha_divergence_coef,
    }
    return PairObjective(
        context,
        lambda sides: loss(sides, config.loss_type, **options),  # type: ignore[arg-type]
        use_reference=True,
        live_reference=not config.precompute_ref_log_probs,
        nll_weight=config.rpo_alpha,
        ld_alpha=config.ld_alpha,
    ).build_method()
