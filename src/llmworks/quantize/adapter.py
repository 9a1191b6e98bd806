"""Stage `quantize.adapter`: a LoRA adapter becomes a GGUF file that llama.cpp puts on its model's, in any number of bits, without folding it in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.artifact import Adapter, Config, Model
from llmworks.context import Context


class AdapterConfig(Config):
    """The number format."""

    type: Literal["f32", "f16"] = Field("f16", description="number format of the adapter's matrices")


def adapter(config: AdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Adapter:
    """Write `adapter.gguf` beside the adapter's own files; llama.cpp with it has to say what the folded model says.

    Errors: ArtifactError when the adapter belongs to another model; ModelError for one that llama.cpp has no place for; GoldenMismatch when llama.cpp computes something else.
    """
    from llmworks.quantize.gguf_adapter import run

    return run(config, adapter, model, ctx)
