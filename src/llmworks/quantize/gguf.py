"""Stage `quantize.gguf`: a Hugging Face directory becomes one GGUF file, with its tokenizer, template and golden
tokens.

Weights, metadata and row order are llama.cpp's own (tested byte for byte against its converter's rules); norms stay
fp32. Before anything is published llama.cpp itself replays the golden tokens on the file.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.quantize.llamacpp.config import GgufConfig

# How far golden logits may move on average, by bits of a weight; SmolLM2-135M moves by less than 0.001 in f32, 0.003 in
# f16, 0.13 in q8_0.


def gguf(
    config: GgufConfig, model: Model, ctx: Context, data: Dataset | None = None, imatrix: Report | None = None
) -> Model:
    """Write `model.gguf` and replay the model's golden tokens on it in llama.cpp; `data`: what the model is for, for
    the importance matrix and the damage; `sense`: what `quantize.imatrix` found, so that it is not looked for again.

    Errors: ModelError for an architecture the layout does not cover, or a type that has to see data and does not;
    DataError for too little text; GoldenMismatch when the file computes something else.
    """
    from llmworks.quantize.llamacpp.run import run

    return run(config, model, ctx, data, imatrix)
