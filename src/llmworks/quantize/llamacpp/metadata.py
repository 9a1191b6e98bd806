"""Write a model's hyperparameters as GGUF keys, by architecture, as llama.cpp's converter does.

Does not know weights or tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmworks.core.errors import ModelError
from llmworks.model.gguf.layout import LAYOUTS
from llmworks.tokenize.load import read_json

REQUIRED_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)


def read_config(path: Path) -> dict[str, Any]:
    """Read `config.json` and check that its architecture can be written as GGUF.

    ModelError for anything that llama.cpp would compute differently.
    """
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    names = config.get("architectures") or []
    if kind not in LAYOUTS or names != [LAYOUTS[kind].model_class]:
        raise ModelError(
            f"{path}: architecture {', '.join(names) or kind} cannot be written as GGUF, only"
            f" {', '.join(layout.model_class for layout in LAYOUTS.values())}"
        )
    missing = [key for key in REQUIRED_KEYS if not isinstance(config.get(key), (int, float))]
    if missing:
        raise ModelError(f"{path}: config.json: {missing[0]!r} is missing, or not a number")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    supported_activations = ("gelu_pytorch_tanh",) if kind == "gemma3_text" else ("silu", "swish")
    if activation not in supported_activations:
        raise ModelError(
            f"{path}: its activation function is {activation!r}, but llama.cpp computes {supported_activations[0]} for"
            " this architecture"
        )
    rope = get_rope_parameters(config)
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ModelError(f"{path}: RoPE scaling with mscale is not supported for this GGUF architecture")
    if rope.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3"):
        raise ModelError(f"{path}: RoPE scaling {rope['rope_type']!r} cannot be written as GGUF")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{path}: partial rotary embeddings (partial_rotary_factor) cannot be written as GGUF")
    if kind in ("llama", "qwen3") and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ModelError(f"{path}: biases are not supported for this GGUF architecture")
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        raise ModelError(f"{path}: sliding-window attention is not supported for this GGUF architecture")
    if kind == "gemma3_text":
        wanted = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
        ]
        if (
            (config.get("layer_types") or wanted) != wanted
            or config.get("sliding_window_pattern", 6) != 6
            or config.get("query_pre_attn_scalar") != config.get("head_dim")
            or config.get("final_logit_softcapping")
        ):
            raise ModelError(
                f"{path}: llama.cpp only supports a Gemma 3 with full attention in every sixth layer,"
                " query_pre_attn_scalar equal to head_dim, and no soft-capping; this model differs"
            )
    return config


def get_rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters of a config, in either of transformers' forms; those of full-attention layers if
    they differ.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters = dict(parameters.get("full_attention") or parameters)
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    return parameters


def compute_llama3_rope_factors(config: Mapping[str, Any]) -> Any:
    """Return the divisors of the rotary frequencies for Llama 3's RoPE scaling, numpy fp32 [head dim / 2]; None for
    other models.
    """
    rope = get_rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    width = _get_head_dim(config)
    low, high, old = (
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        float(rope["original_max_position_embeddings"]),
    )
    found = []
    for place in range(0, width, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (place / width)
        share = (old / length - low) / (high - low)
        found.append(
            1.0
            if length < old / high
            else float(rope["factor"])
            if length > old / low
            else 1 / ((1 - share) / float(rope["factor"]) + share)
        )
    return np.array(found, dtype=np.float32)


def _get_head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_hyperparameters(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the architecture's keys."""
    kind, heads, width, rope = (
        config["model_type"],
        int(config["num_attention_heads"]),
        _get_head_dim(config),
        get_rope_parameters(config),
    )
    window = config.get("sliding_window")
    context = int(config["max_position_embeddings"])
    if kind == "mistral" and window:
        context = min(
            context, int(window)
        )  # llama.cpp has no sliding window for this architecture; within it attention is the same
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    if rope["rope_type"] in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(float(rope[key]))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if kind != "phi3":
        writer.add_key_length(width)
        writer.add_value_length(width)
    if kind in ("llama", "mistral"):
        writer.add_vocab_size(int(config["vocab_size"]))
    if kind in ("llama", "mistral", "phi3"):
        writer.add_rope_dimension_count(width)
    if kind == "gemma3_text":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        writer.add_float32(
            "gemma3.rope.freq_base_swa", float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)
        )
        writer.add_sliding_window(int(window or 0))
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(
            int(
                config.get("original_max_position_embeddings")
                or rope.get("original_max_position_embeddings")
                or context
            )
        )
        writer.add_sliding_window(int(window or 0))
