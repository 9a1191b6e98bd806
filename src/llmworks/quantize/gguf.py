"""Stage `quantize.gguf`: a Hugging Face directory becomes one GGUF file, with its tokenizer, template and golden tokens.

Weights, metadata and row order are llama.cpp's own (tested byte for byte against its converter's rules); norms stay fp32. Before
anything is published llama.cpp itself replays the golden tokens on the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmworks.artifact import Config, Model
from llmworks.context import Context
from llmworks.errors import ModelError
from llmworks.tokenize.load import read_json

# How far golden logits may move on average. SmolLM2-135M moves by less than 0.001, by 0.003 and by 0.13.
BOUNDS = {"f32": 0.02, "f16": 0.05, "q8_0": 0.3}


class GgufConfig(Config):
    """Which number format the matrices get."""

    type: Literal["f32", "f16", "q8_0"] = Field(
        "q8_0", description="number format of the matrices: q8_0 is 8 bits per weight with one fp16 scale per 32 weights"
    )


def gguf(config: GgufConfig, model: Model, ctx: Context) -> Model:
    """Write `model.gguf` and replay the model's golden tokens on it in llama.cpp.

    Errors: ModelError for an architecture the layout does not cover; GoldenMismatch when the file computes something else.
    """
    from llmworks.generate.engines.llamacpp import LlamaCppEngine
    from llmworks.model.golden import record
    from llmworks.model.load import check_weights
    from llmworks.quantize.gguf_file import write_gguf
    from llmworks.tokenize.golden import require

    if model.format != "hf":
        raise ModelError(f"{model.path}: is {model.format} already; quantize.gguf takes a Hugging Face directory")
    check_weights(model.path)
    golden = model.golden or record(model.path)
    target = ctx.out / "model.gguf"
    write_gguf(model.path, target, config.type, ctx.progress)
    engine = LlamaCppEngine(target, name="model.gguf")
    try:
        gap = require(golden, engine.tokenizer, engine.stops, engine.logits, mean_within=BOUNDS[config.type], step="quantize.gguf")
    finally:
        engine.close()
    assert gap is not None
    metrics: dict[str, Any] = {
        "bytes": target.stat().st_size, "golden_gap_mean": round(gap.mean, 5), "golden_gap_largest": round(gap.largest, 5), "golden_same_greedy": round(gap.same_greedy, 5),
    }  # fmt: skip
    return Model(ctx.out, golden=golden, metrics=metrics, about={"format": "gguf", "type": config.type})


def read_config(path: Path) -> dict[str, Any]:
    """`config.json`, checked to be of the Llama layout that GGUF writing covers."""
    config = read_json(path / "config.json")
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise ModelError(f"{path}: architecture {config.get('architectures')} cannot be written as GGUF, only LlamaForCausalLM")
    scaling = config.get("rope_scaling") or (config.get("rope_parameters") or {})
    if scaling and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ModelError(f"{path}: rope scaling {scaling.get('rope_type')!r} cannot be written as GGUF yet")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ModelError(f"{path}: biases cannot be written in this GGUF layout")
    return config
