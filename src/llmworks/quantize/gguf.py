"""Stage `quantize.gguf`: convert a Hugging Face directory to one GGUF file, with its tokenizer, chat template and
golden tokens.

Weights, metadata and row order are llama.cpp's own (tested byte for byte against its converter's rules); norms stay
fp32. Before publication llama.cpp replays the golden tokens on the file.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import GgufConfig

# SmolLM2-135M's golden logits change on average by less than 0.001 in f32, 0.003 in f16, 0.13 in q8_0; the tolerances
# are in llamacpp/config.py.


def gguf(
    config: GgufConfig, model: Model, ctx: Context, data: Dataset | None = None, imatrix: Report | None = None
) -> Model:
    """Write `model.gguf` and replay the model's golden tokens on it in llama.cpp. `data`: calibration data for the
    importance matrix and the evaluation; `imatrix`: a result of `quantize.imatrix` to reuse.

    Errors: ModelError for an unsupported architecture, or a type that requires an importance matrix without one;
    DataError for too little data; GoldenMismatch when the file computes something else.
    """
    from llmworks.quantize.llamacpp.run import run

    return run(config, model, ctx, data, imatrix)
