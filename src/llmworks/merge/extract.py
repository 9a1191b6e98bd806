"""Stage `merge.extract`: extract a LoRA adapter from a fine-tuned model and its base by a truncated SVD of each
matrix's difference; reports the approximation error.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.merge.lora.config import ExtractConfig


def extract(config: ExtractConfig, model: Model, base: Model, ctx: Context) -> Adapter:
    """Write a peft adapter that turns `base` into an approximation of `model`; both are read matrix by matrix.

    Errors: ModelError for models of different shapes, or that do not differ in any matrix.
    """
    from llmworks.merge.lora.extract_lora import extract_adapter

    return extract_adapter(config, model, base, ctx)
