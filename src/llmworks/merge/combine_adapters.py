"""Stage `merge.combine_adapters`: several LoRA adapters of one model as one: side by side, their factors' mean, or their
products merged by a method of `merge` and brought back to a rank.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.merge.lora.config import CombineAdaptersConfig


def combine_adapters(
    config: CombineAdaptersConfig, adapters: dict[str, Adapter], model: Model, ctx: Context
) -> Adapter:
    """Merge `adapters`, by name, of `model`.

    Errors: ArtifactError for adapters of another model; ModelError for those that are no plain LoRA; UserError for
    names or ranks that do not fit.
    """
    from llmworks.merge.lora.merge_lora import merged

    return merged(config, adapters, model, ctx)
