"""Stage `align.dpo`: direct preference optimization, and the losses of its family.

The better of two answers becomes more probable, held to where the policy began.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, PreferenceConfig, prefer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.train.finetune.method import Way

SMOOTH = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # which know that labels may be wrong
PLAIN = (
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "aot",
    "aot_unpaired",
)  # which take log-ratios as they are


class DpoConfig(PreferenceConfig):
    """Which loss of the family, and how far the policy may go."""

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
            "sigmoid: DPO, with `smoothing` cDPO; of means over tokens: ipo, sigmoid-mean; others as their papers name"
            " them, each with its source in align/losses/dpo.py"
        ),
    )
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference (ipo: tau)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description=f"chance that a label is wrong, for {', '.join(SMOOTH)}"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl",
        description=(
            "what the policy is held to the reference by: reverse KL is DPO; the others are f-DPO's (arXiv:2309.16240)"
        ),
    )
    f_alpha_divergence_coef: float = Field(0.5, description="of divergence alpha")
    ld_alpha: float = Field(
        1.0,
        ge=0,
        le=1,
        description=(
            "what tokens beyond the shorter answer of a pair count; less than 1 is against rewards for length (LD-DPO,"
            " arXiv:2409.06411)"
        ),
    )
    rpo_alpha: float = Field(
        0.0,
        ge=0,
        description=(
            "how much the chosen answers are learned beside it, in nats a token; 1 is usual (RPO, arXiv:2404.19733)"
        ),
    )
    precompute_ref_log_probs: bool = Field(
        True,
        description=(
            "chances to the reference: computed once before training and kept, or beside every step with the adapter"
            " switched off"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.label_smoothing and self.loss_type not in SMOOTH:
            raise ValueError(f"smoothing is for loss {', '.join(SMOOTH)}, not for {self.loss_type}")
        if self.loss_type in ("exo_pair",) and not self.label_smoothing:
            raise ValueError("loss exo needs smoothing above 0, as 0.001: the logarithm of it is in the formula")
        if self.f_divergence_type != "reverse_kl" and self.loss_type in PLAIN:
            raise ValueError(f"divergence is not for loss {self.loss_type}, which takes log-ratios as they are")
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ValueError("divergence_alpha is for divergence alpha")
        if self.loss_type.startswith("aot") and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"loss {self.loss_type} compares all pairs of a step; set accumulation to 1 and batch_size to what a"
                " step has"
            )
        if not self.precompute_ref_log_probs and self.method != "lora":
            raise ValueError(
                "reference live needs an adapter that can be switched off (method lora); with method full the chances"
                " are computed once: cached"
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
    """Train the policy on preference pairs.

    With `adapter` it is the policy's, goes on, and as it is now is the reference; `reference`: another model in its
    place.

    Errors: DataError when no pair can be used; UserError for a reference with another vocabulary; ArtifactError for an
    adapter of another model; TrainingError when the loss stops being a number.
    """
    if ref_model is not None and not config.precompute_ref_log_probs:
        raise UserError(
            "config.reference live is the policy as it began; with the input `reference` its chances are computed once:"
            " cached"
        )
    return prefer(
        config,
        Policy(policy, adapter),
        pairs,
        ctx,
        eval_data,
        functools.partial(way_of, config),
        "align.dpo",
        reference=ref_model,
    )


def way_of(config: DpoConfig, given: Given) -> Way:
    """The loss of this configuration, for a policy that is there."""
    from llmworks.align.losses.dpo import dpo as loss
    from llmworks.align.preference.objective import Pairs

    options = {
        "beta": config.beta,
        "smoothing": config.label_smoothing,
        "divergence": config.f_divergence_type,
        "alpha": config.f_alpha_divergence_coef,
    }
    return Pairs(
        given,
        lambda sides: loss(sides, config.loss_type, **options),  # type: ignore[arg-type]
        compared=True,
        live=not config.precompute_ref_log_probs,
        learn=config.rpo_alpha,
        tail=config.ld_alpha,
    ).way()
