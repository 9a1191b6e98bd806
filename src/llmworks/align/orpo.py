"""Stage `align.orpo`: odds ratio preference optimization.

Fine-tuning and alignment in one: chosen answers are learned, and their odds over the rejected ones' raised; no
reference.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.align.preference.run import Policy, PreferenceConfig, prefer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.train.finetune.method import Way


class OrpoConfig(PreferenceConfig):
    """How much the odds weigh beside what is learned."""

    orpo_lambda: float = Field(0.1, ge=0, description="of the odds (lambda of the paper)")
    train_on_prompts: bool = Field(
        False, description="learn the prompts, too, as the authors' code and TRL do; else the answers only"
    )


def orpo(
    config: OrpoConfig,
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
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(way_of, config), "align.orpo"
    )


def way_of(config: OrpoConfig, given: Given) -> Way:
    """The loss of this configuration, for a policy that is there."""
    from llmworks.align.losses.orpo import orpo as loss
    from llmworks.align.preference.objective import Pairs

    return Pairs(
        given,
        lambda sides: loss(sides, weight=config.orpo_lambda),
        compared=False,
        learn=1.0,
        prompts=config.train_on_prompts,
    ).way()
