"""Stage `align.simpo`: simple preference optimization.

Rewards are mean log-probabilities, so that length is none, and should be apart by a margin; no reference.
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


class SimpoConfig(PreferenceConfig):
    """How large the margin is, and in what."""

    beta: float = Field(2.0, gt=0, description="reward of a nat a token")
    simpo_gamma: float = Field(
        1.0, ge=0, description="how far rewards should be apart (gamma; of beta usually 0.3 to 0.7)"
    )
    alpha: float = Field(
        0.0, description="bends the reward: (1 - p^-alpha) / alpha (AlphaPO, arXiv:2501.03884); 0: log p"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="chance that a label is wrong")
    cpo_alpha: float = Field(
        0.0, ge=0, description="how much the chosen answers are learned beside it, in nats a token (CPO-SimPO)"
    )


def simpo(
    config: SimpoConfig,
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
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(way_of, config), "align.simpo"
    )


def way_of(config: SimpoConfig, given: Given) -> Way:
    """The loss of this configuration, for a policy that is there."""
    from llmworks.align.losses.simpo import simpo as loss
    from llmworks.align.preference.objective import Pairs

    return Pairs(
        given,
        lambda sides: loss(
            sides, beta=config.beta, margin=config.simpo_gamma, smoothing=config.label_smoothing, alpha=config.alpha
        ),
        compared=False,
        learn=config.cpo_alpha,
    ).way()
