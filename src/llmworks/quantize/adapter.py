"""Stage `quantize.adapter`: a LoRA adapter becomes a GGUF file that llama.cpp puts on its model's, in any number of
bits, without folding it in.
"""

from __future__ import annotations

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import AdapterConfig


def adapter(config: AdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Adapter:
    """Write `adapter.gguf` beside the adapter's own files; llama.cpp with it has to say what the folded model says.

    Errors: ArtifactError when the adapter belongs to another model; ModelError for one that llama.cpp has no place for;
    GoldenMismatch when llama.cpp computes something else.
    """
    from llmworks.quantize.llamacpp.adapter import run

    return run(config, adapter, model, ctx)
