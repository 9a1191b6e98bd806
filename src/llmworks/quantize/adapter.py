"""Stage `quantize.adapter`: convert a LoRA adapter to a GGUF file that llama.cpp applies to its model at any bit
width, without merging it.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import GgufAdapterConfig


def adapter(config: GgufAdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Adapter:
    """Write `adapter.gguf` beside the adapter's own files; llama.cpp with it must match the merged model's
    log-probabilities.

    Errors: ArtifactError when the adapter belongs to another model; ModelError for one that llama.cpp cannot represent;
    GoldenMismatch when llama.cpp computes something else.
    """
    from llmworks.quantize.llamacpp.adapter import run

    return run(config, adapter, model, ctx)
