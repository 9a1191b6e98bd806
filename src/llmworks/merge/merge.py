"""Stage `merge`: several models as one, by mergekit's YAML; read, computed and written block by block, so that no model
is in memory.

The result's tokens, mask and stop tokens are those of the model whose tokenizer it has; its logits are recorded anew.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.merge.plan.config import MergeConfig


def merge(config: MergeConfig, models: dict[str, Model], ctx: Context) -> Model:
    """Merge `models`, which the config names by their keys, into one Hugging Face directory.

    Errors: UserError for a configuration that cannot be carried out; ModelError for tensors that are missing, of other
    shapes, or hold what are no numbers, and for vocabularies that differ where no rule for tokens is given;
    GoldenMismatch where the result would read texts in another way.
    """
    from llmworks.merge.execute.run import run

    return run(config, models, ctx)
