"""Stage `align.reward`: train a reward model on preference pairs.

The output has a score head in place of the LM head; transformers loads it as a sequence classification model. Use it
as the input `reward_model` of `align.grpo`, `align.rloo`, `align.ppo` and `align.online_dpo`.
"""

from __future__ import annotations

from llmworks.align.preference.examples import make_ids_unique
from llmworks.align.preference.run import EVAL_ID_SUFFIX, Policy, read_rows, tokenize_rows
from llmworks.align.reward_model.config import RewardConfig
from llmworks.align.reward_model.train import train_scorer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.train.finetune.method import TrainingData
from llmworks.train.finetune.run import get_context_length


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
    tokenizer, stops = policy.open_tokenizer(config, "align.reward")
    max_length = min(config.max_length, get_context_length(model))
    rows, eval_rows = (
        read_rows(pairs, single_completions=False),
        read_rows(eval_data, single_completions=False)[: config.eval_samples] if eval_data is not None else [],
    )
    examples, rejected_rows = tokenize_rows(config, tokenizer, rows, pairs.name, max_length, single_completions=False)
    eval_examples = (
        make_ids_unique(
            tokenize_rows(config, tokenizer, eval_rows, eval_data.name, max_length, single_completions=False)[0],
            EVAL_ID_SUFFIX,
        )
        if eval_data is not None
        else []
    )
    ctx.progress.log(f"{len(examples)} pairs" + (f"; {len(rejected_rows)} rows rejected" if rejected_rows else ""))
    return train_scorer(
        config, policy, TrainingData(tokenizer, stops, examples, rejected_rows, eval_examples, []), ctx, "whole", {}
    )
