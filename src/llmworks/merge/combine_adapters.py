"""Stage `merge.combine_adapters`: combine several LoRA adapters of one model into one: concatenate them, average
their factors, or merge their products B A by a method of `merge` and truncate the result to a rank.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.merge.lora.config import CombineAdaptersConfig


def combine_adapters(
    config: CombineAdaptersConfig, adapters: dict[str, Adapter], model: Model, ctx: Context
) -> Adapter:
    """Combine `adapters`, given by name, of `model`.

    Errors: ArtifactError for adapters of another model; ModelError for adapters that are not plain LoRA; UserError for
    names or ranks that do not match.
    """
    from llmworks.merge.lora.merge_lora import combine_adapters

    return combine_adapters(config, adapters, model, ctx)
