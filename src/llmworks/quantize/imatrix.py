"""Stage `quantize.imatrix`: compute an importance matrix (mean squares of each matrix's inputs) and the cost of each
quantization format per tensor, once for many files.

`importance.gguf` is llama.cpp's importance matrix, usable by its own tools. `quantize.gguf` takes the result as
`imatrix`.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import ImatrixConfig


def imatrix(config: ImatrixConfig, model: Model, ctx: Context, data: Dataset) -> Report:
    """Compute mean squares of each matrix's inputs, and costs in nats per token by tensor and format.

    Errors: ModelError for an unsupported architecture; DataError for too little data.
    """
    from llmworks.quantize.llamacpp.run import compute_imatrix as run

    return run(config, model, ctx, data)
