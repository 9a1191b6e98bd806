"""Stage `quantize.sense`: what a model's quantizer has to know of what it is for, once for many files: what each matrix reads, and what each number format would cost it.

`importance.gguf` is llama.cpp's importance matrix, for its own tools, too. `quantize.gguf` takes the result as `sense`.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.artifact import Config, Dataset, Model, Report
from llmworks.context import Context


class SenseConfig(Config):
    """How much is looked at."""

    texts: int = Field(128, gt=0, description="texts of `data` that say what is important")
    sensed: int = Field(8, ge=0, description="of these, texts by which costs of formats are found; 0: costs are not")
    length: int = Field(512, gt=1, le=2048, description="tokens of a text of `data`")


def sense(config: SenseConfig, model: Model, ctx: Context, data: Dataset) -> Report:
    """Mean squares of what each matrix reads, and costs in nats a token by tensor and format. Errors: ModelError for another architecture; DataError for too little text."""
    from llmworks.quantize.gguf_run import sense as run

    return run(config, model, ctx, data)
