"""Stage `merge.extract`: what a tuned model differs by from its base, as a LoRA adapter: the largest singular vectors
of each matrix's change, and what they miss.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.merge.lora.config import ExtractConfig


def extract(config: ExtractConfig, model: Model, base: Model, ctx: Context) -> Adapter:
    """A peft adapter that makes `base` into nearly `model`; both are read matrix by matrix.

    Errors: ModelError for models of different shapes, or that do not differ in any matrix.
    """
    from llmworks.merge.lora.extract_lora import extracted

    return extracted(config, model, base, ctx)
