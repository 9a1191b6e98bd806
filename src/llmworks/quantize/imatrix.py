"""Stage `quantize.imatrix`: what a model's quantizer has to know of what it is for, once for many files: what each matrix
reads, and what each number format would cost it.

`importance.gguf` is llama.cpp's importance matrix, for its own tools, too. `quantize.gguf` takes the result as `sense`.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import ImatrixConfig


def imatrix(config: ImatrixConfig, model: Model, ctx: Context, data: Dataset) -> Report:
    """Mean squares of what each matrix reads, and costs in nats a token by tensor and format.

    Errors: ModelError for another architecture; DataError for too little text.
    """
    from llmworks.quantize.llamacpp.run import sense as run

    return run(config, model, ctx, data)
