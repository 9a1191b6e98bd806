"""Stage `align.orpo`: odds ratio preference optimization.

Combines SFT on the chosen completions with an odds-ratio preference loss; no reference model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy, PreferenceConfig, run_preference
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.train.finetune.method import TrainMethod


class OrpoConfig(PreferenceConfig):
    """Weight of the odds-ratio loss and the tokens the SFT loss covers."""

    orpo_lambda: float = Field(0.1, ge=0, description="ORPO lambda: weight of the odds-ratio loss")
    train_on_prompts: bool = Field(
        False,
        description=(
            "compute the SFT loss on prompt tokens too, as the authors' code and TRL do; else on completions only"
        ),
    )


def orpo(
    config: OrpoConfig,
    policy: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on preference pairs with an SFT and an odds-ratio loss.

    `adapter`: the policy's adapter to continue training.

    Errors: DataError when no pair can be used; ArtifactError for an adapter of another model; TrainingError when the
    loss is not finite.
    """
    return run_preference(
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(build_method, config), "align.orpo"
    )


def build_method(config: OrpoConfig, context: MethodContext) -> TrainMethod:
    """Return the training method with this configuration's loss."""
    from llmworks.align.losses.orpo import orpo as loss
    from llmworks.align.preference.objective import PairObjective

    return PairObjective(
        context,
        lambda sides: loss(sides, weight=config.orpo_lambda),
        use_reference=False,
        nll_weight=1.0,
        train_on_prompts=config.train_on_prompts,
    ).build_method()
