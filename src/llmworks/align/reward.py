"""Stage `align.reward`: train a reward model on preference pairs.

The output has a score head in place of the LM head; transformers loads it as a sequence classification model. Use it
as the input `reward_model` of `align.grpo`, `align.rloo`, `align.ppo` and `align.online_dpo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmworks.align.preference.examples import apart
from llmworks.align.preference.run import HELD, Policy, examples_of, rows_of
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.train.finetune.method import Material
from llmworks.train.finetune.run import context_of

if TYPE_CHECKING:
    pass

from llmworks.align.reward_model.config import RewardConfig
from llmworks.align.reward_model.train import train_scorer


def reward(
    config: RewardConfig,
    model: Model,
    pairs: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Model:
    """Train a reward model on preference pairs (Bradley-Terry).

    The score head is added to the model, or to the model with `adapter`.

    Errors: DataError when no pair can be used; ModelError for an unknown architecture; TrainingError when the loss is
    not finite.
    """
    policy = Policy(model, adapter)
    tokenizer, stops = policy.open(config, "align.reward")
    most = min(config.max_length, context_of(model))
    rows, unseen = (
        rows_of(pairs, singles=False),
        rows_of(eval_data, singles=False)[: config.eval_samples] if eval_data is not None else [],
    )
    examples, lost = examples_of(config, tokenizer, rows, pairs.name, most, singles=False)
    tests = (
        apart(examples_of(config, tokenizer, unseen, eval_data.name, most, singles=False)[0], HELD)
        if eval_data is not None
        else []
    )
    ctx.progress.say(f"{len(examples)} pairs" + (f"; {len(lost)} rows rejected" if lost else ""))
    return train_scorer(config, policy, Material(tokenizer, stops, examples, lost, tests, []), ctx, "whole", {})
