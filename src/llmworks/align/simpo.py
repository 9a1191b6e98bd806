"""Stage `align.simpo`: simple preference optimization.

The reward is the mean log-probability of a completion (length-normalized), with a target margin; no reference model.
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


class SimpoConfig(PreferenceConfig):
    """Reward scale, target margin and reward shape of SimPO."""

    beta: float = Field(2.0, gt=0, description="scale of the reward: reward per nat per token")
    simpo_gamma: float = Field(
        1.0, ge=0, description=("SimPO gamma: target margin between the rewards (usually 0.3 to 0.7 of beta)")
    )
    alpha: float = Field(0.0, description="AlphaPO alpha: reward (1 - p^-alpha) / alpha (arXiv:2501.03884); 0: log p")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description=("label smoothing: probability that a preference label is flipped")
    )
    cpo_alpha: float = Field(
        0.0, ge=0, description="CPO-SimPO: weight of an NLL loss on chosen completions, in nats per token"
    )


def simpo(
    config: SimpoConfig,
    policy: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the policy on preference pairs by length-normalized rewards.

    `adapter`: the policy's adapter to continue training.

    Errors: DataError when no pair can be used; ArtifactError for an adapter of another model; TrainingError when the
    loss is not finite.
    """
    return run_preference(
        config, Policy(policy, adapter), pairs, ctx, eval_data, functools.partial(build_method, config), "align.simpo"
    )


def build_method(config: SimpoConfig, context: MethodContext) -> TrainMethod:
    """Return the training method with this configuration's loss."""
    from llmworks.align.losses.simpo import simpo as loss
    from llmworks.align.preference.objective import PairObjective

    return PairObjective(
        context,
        lambda sides: loss(
            sides,
            beta=config.beta,
            gamma=config.simpo_gamma,
            label_smoothing=config.label_smoothing,
            alpha=config.alpha,
        ),
        use_reference=False,
        nll_weight=config.cpo_alpha,
    ).build_method()
