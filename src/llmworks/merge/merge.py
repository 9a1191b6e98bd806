"""Stage `merge`: merge several models into one by mergekit's YAML; read, computed and written block by block, so that
no model is held in memory.

Token ids, loss mask and stop tokens of the result are those of the model whose tokenizer it has; its golden logits are
recorded anew.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.merge.plan.config import MergeConfig


def merge(config: MergeConfig, models: dict[str, Model], ctx: Context) -> Model:
    """Merge `models`, which the config refers to by their keys, into one Hugging Face directory.

    Errors: UserError for an invalid configuration; ModelError for tensors that are missing, differ in shape or hold NaN
    or infinite values, and for vocabularies that differ without a tokenizer rule; GoldenMismatch where the result would
    tokenize text differently.
    """
    from llmworks.merge.execute.run import run

    return run(config, models, ctx)
