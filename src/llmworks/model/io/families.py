"""Read and write the decoder as standard architectures: Llama, Mistral, Qwen2, Qwen3, Gemma 3 and GPT-2.

A shape that matches one is saved under its name and loads in plain transformers; any other is saved as our own. A
config with features that the decoder does not have is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmworks.core.errors import ModelError
from llmworks.model.nn.decoder import DecoderConfig
from llmworks.model.shape import Rope, Shape, read_stored

Json = dict[str, Any]
LLAMA_NAMES = {
    "decoder.embedding.": "model.embed_tokens.",
    "decoder.norm.": "model.norm.",
    "head.": "lm_head.",
    "decoder.blocks.": "model.layers.",
    ".attention.query.": ".self_attn.q_proj.",
    ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.",
    ".attention.out.": ".self_attn.o_proj.",
    ".attention.query_norm.": ".self_attn.q_norm.",
    ".attention.key_norm.": ".self_attn.k_norm.",
    ".attention_norm.": ".input_layernorm.",
    ".feed_forward_norm.": ".post_attention_layernorm.",
    ".feed_forward.gate.": ".mlp.gate_proj.",
    ".feed_forward.up.": ".mlp.up_proj.",
    ".feed_forward.down.": ".mlp.down_proj.",
}
GEMMA_NAMES = LLAMA_NAMES | {
    ".feed_forward_norm.": ".pre_feedforward_layernorm.",
    ".after_attention_norm.": ".post_attention_layernorm.",
    ".after_feed_forward_norm.": ".post_feedforward_layernorm.",
}
GPT2_NAMES = {
    "decoder.embedding.": "transformer.wte.",
    "decoder.position.": "transformer.wpe.",
    "decoder.norm.": "transformer.ln_f.",
    "head.": "lm_head.",
    "decoder.blocks.": "transformer.h.",
    ".attention.out.": ".attn.c_proj.",
    ".attention_norm.": ".ln_1.",
    ".feed_forward_norm.": ".ln_2.",
    ".feed_forward.up.": ".mlp.c_fc.",
    ".feed_forward.down.": ".mlp.c_proj.",
}
TANH = "gelu_pytorch_tanh"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": TANH, TANH: TANH}  # in config.json -> here


@dataclass(frozen=True)
class StandardArchitecture:
    """One architecture: its class in config.json, its tensor names, and functions that read and write its config."""

    architecture: str
    names: Mapping[str, str]
    read: Callable[[Json], Json]  # shape fields besides the common ones
    write: Callable[[Shape], Json]
    matches: Callable[[Shape], bool]


ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def _read_rope(config: Json, layers: str = "") -> Json:
    """Read the RoPE parameters of a config, in either of transformers' formats."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layers and isinstance(given, dict) and layers in given:
        given = given[layers] or {}
    if not isinstance(given, dict):
        raise ModelError(f"config.json: rope_parameters must be an object, not {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelError(f"config.json: RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if given.get("truncate") is False:
        raise ModelError("config.json: rope_parameters.truncate false is not supported")
    if (
        given.get("attention_factor") is not None
        or given.get("mscale")
        or given.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ModelError(
            "config.json: attention_factor, mscale and partial_rotary_factor in rope_parameters are not supported"
        )
    rope: Json = {
        "rope_theta": float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope_type": kind,
    }
    if kind != "default":
        rope |= {
            "factor": float(given["factor"]),
            "original_max_position_embeddings": int(given.get("original_max_position_embeddings") or 0),
        }
    if kind == "yarn":
        rope |= {"beta_fast": float(given.get("beta_fast") or 32), "beta_slow": float(given.get("beta_slow") or 1)}
    if kind == "llama3":
        rope |= {"beta_fast": float(given["high_freq_factor"]), "beta_slow": float(given["low_freq_factor"])}
    return rope


def _write_rope(rope: Rope, context: int) -> Json:
    out: Json = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.rope_type != "default":
        out["factor"] = rope.factor
    if rope.rope_type in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = rope.original_max_position_embeddings or int(context / rope.factor)
    if rope.rope_type == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    if rope.rope_type == "llama3":
        out |= {"high_freq_factor": rope.beta_fast, "low_freq_factor": rope.beta_slow}
    return out


# fields with one name in `Shape` and in the configurations of transformers
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAME = (*SIZES, "intermediate_size", "max_position_embeddings")


def _read_common(config: Json) -> Json:
    """Read the fields that have the same names in all architectures but GPT-2."""
    heads = config["num_attention_heads"]
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"config.json: the activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return {name: config[name] for name in SAME} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or 0,
        "norm_eps": config["rms_norm_eps"],
        "hidden_act": ACTIVATIONS[activation],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def _write_common(shape: Shape) -> Json:
    return {name: getattr(shape, name) for name in SAME} | {
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.inner_size,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": shape.hidden_act,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "rope_parameters": _write_rope(shape.rope_parameters, shape.max_position_embeddings),
        "attention_dropout": 0.0,
    }


def _read_llama(config: Json) -> Json:
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise ModelError("config.json: attention_bias without mlp_bias (or the reverse) is not supported")
    return {"rope_parameters": _read_rope(config), "bias": "all" if config.get("attention_bias") else "none"}


def _read_sliding_window(config: Json) -> Json:
    """Read Qwen's sliding window, which only the later layers may have."""
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        raise ModelError("config.json: layer_types that differ between layers are not supported")
    if not config.get("use_sliding_window"):
        return {}
    if config.get("max_window_layers", 0) > 0:
        raise ModelError("config.json: a sliding window in the last layers only (max_window_layers) is not supported")
    return {"sliding_window": config.get("sliding_window") or 0}


def _write_qwen_window(shape: Shape) -> Json:
    window = shape.sliding_window
    return {"use_sliding_window": bool(window), "sliding_window": window or None, "max_window_layers": 0}


def _read_gemma(config: Json) -> Json:
    layers = config.get("layer_types") or []
    pattern = config.get("sliding_window_pattern") or (
        layers.index("full_attention") + 1 if "full_attention" in layers else 6
    )
    wanted = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    if (layers and layers != wanted) or config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        raise ModelError("config.json: irregular layer_types and logit softcapping are not supported")
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is not supported; the decoder's attention is causal")
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return {
        "norm_position": "sandwich",
        "norm_unit_offset": True,
        "use_qk_norm": True,
        "scale_embedding": True,
        "attention_multiplier": float(config["query_pre_attn_scalar"]) ** -0.5,
        "sliding_window": config["sliding_window"],
        "global_attn_every_n_layers": pattern,
        "rope_parameters": _read_rope(config, "full_attention"),
        "local_rope_theta": float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _write_gemma(shape: Shape) -> Json:
    out = _write_common(shape)
    return out | {
        "hidden_activation": out.pop("hidden_act"),
        "query_pre_attn_scalar": round(shape.attention_multiplier**-2)
        if shape.attention_multiplier
        else shape.head_size,
        "sliding_window": shape.sliding_window,
        "layer_types": [
            "sliding_attention" if shape.get_sliding_window(i) else "full_attention"
            for i in range(shape.num_hidden_layers)
        ],
        "rope_parameters": {
            "full_attention": _write_rope(shape.rope_parameters, shape.max_position_embeddings),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": shape.local_rope_theta or shape.rope_parameters.rope_theta,
            },
        },
    }


def _read_gpt2(config: Json) -> Json:
    if (
        config.get("scale_attn_by_inverse_layer_idx")
        or not config.get("scale_attn_weights", True)
        or config.get("n_inner") == 0
    ):
        raise ModelError(
            "config.json: attention scaled by layer or unscaled (scale_attn_*) and n_inner 0 are not supported"
        )
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config.get("n_inner") or 4 * config["n_embd"],
        "max_position_embeddings": config["n_positions"],
        "norm": "layer",
        "norm_eps": config["layer_norm_epsilon"],
        "position_embedding_type": "learned",
        "hidden_act": ACTIVATIONS[config["activation_function"]],
        "gated_mlp": False,
        "bias": "all",
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _write_gpt2(shape: Shape) -> Json:
    return {
        "vocab_size": shape.vocab_size,
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_hidden_layers,
        "n_head": shape.num_attention_heads,
        "n_inner": shape.inner_size,
        "n_positions": shape.max_position_embeddings,
        "layer_norm_epsilon": shape.norm_eps,
        "activation_function": "gelu_new" if shape.hidden_act == TANH else shape.hidden_act,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _is_llama_like(shape: Shape) -> bool:
    """Return whether a shape has what Llama-like models share: pre-norm RMSNorm, RoPE, gated MLP, no experts."""
    plain = (
        shape.norm == "rms"
        and shape.norm_position == "pre"
        and not shape.norm_unit_offset
        and shape.position_embedding_type == "rope"
        and shape.gated_mlp
        and not shape.experts
        and shape.rope_parameters.rope_type != "ntk"
    )
    return (
        plain and not shape.scale_embedding and not shape.attention_multiplier and not shape.global_attn_every_n_layers
    )


STANDARD_ARCHITECTURES: dict[str, StandardArchitecture] = {
    "llama": StandardArchitecture(
        "LlamaForCausalLM",
        LLAMA_NAMES,
        _read_llama,
        lambda s: _write_common(s) | {"attention_bias": s.bias == "all", "mlp_bias": s.bias == "all"},
        lambda s: _is_llama_like(s) and s.bias in ("none", "all") and not s.use_qk_norm and not s.sliding_window,
    ),
    "mistral": StandardArchitecture(
        "MistralForCausalLM",
        LLAMA_NAMES,
        lambda c: {"rope_parameters": _read_rope(c), "sliding_window": c.get("sliding_window") or 0},
        lambda s: _write_common(s) | {"sliding_window": s.sliding_window or None},
        lambda s: _is_llama_like(s) and s.bias == "none" and not s.use_qk_norm,
    ),
    "qwen2": StandardArchitecture(
        "Qwen2ForCausalLM",
        LLAMA_NAMES,
        lambda c: {"rope_parameters": _read_rope(c), "bias": "qkv", **_read_sliding_window(c)},
        lambda s: _write_common(s) | _write_qwen_window(s),
        lambda s: _is_llama_like(s) and s.bias == "qkv" and not s.use_qk_norm,
    ),
    "qwen3": StandardArchitecture(
        "Qwen3ForCausalLM",
        LLAMA_NAMES,
        lambda c: {
            "rope_parameters": _read_rope(c),
            "use_qk_norm": True,
            "bias": "qkv" if c.get("attention_bias") else "none",
            **_read_sliding_window(c),
        },
        lambda s: _write_common(s) | {"attention_bias": False} | _write_qwen_window(s),
        lambda s: _is_llama_like(s) and s.bias == "none" and s.use_qk_norm,
    ),
    "gemma3_text": StandardArchitecture(
        "Gemma3ForCausalLM",
        GEMMA_NAMES,
        _read_gemma,
        _write_gemma,
        lambda s: (
            s.norm == "rms"
            and s.norm_position == "sandwich"
            and s.norm_unit_offset
            and s.use_qk_norm
            and s.scale_embedding
            and s.position_embedding_type == "rope"
            and s.gated_mlp
            and s.bias == "none"
            and bool(s.sliding_window and s.global_attn_every_n_layers)
            and not s.experts
            and s.rope_parameters.rope_type != "ntk"
        ),
    ),
    "gpt2": StandardArchitecture(
        "GPT2LMHeadModel",
        GPT2_NAMES,
        _read_gpt2,
        _write_gpt2,
        lambda s: (
            s.norm == "layer"
            and s.norm_position == "pre"
            and s.position_embedding_type == "learned"
            and not s.gated_mlp
            and s.bias == "all"
            and s.num_kv_heads == s.num_attention_heads
            and not s.head_dim
            and not (s.use_qk_norm or s.sliding_window or s.experts or s.scale_embedding or s.attention_multiplier)
        ),
    ),
}


def parse_shape(config: Json) -> tuple[str, Shape]:
    """Return (architecture name, shape) of a config.json.

    ModelError for an unsupported architecture, or one with features the decoder does not have.
    """
    kind = str(config.get("model_type"))
    if kind == DecoderConfig.model_type:
        return "", Shape.model_validate(read_stored(config["shape"]))
    if kind not in STANDARD_ARCHITECTURES:
        known = ", ".join(STANDARD_ARCHITECTURES)
        raise ModelError(f"config.json: the architecture {kind!r} is not supported; supported: {known}")
    try:
        common = {} if kind == "gpt2" else _read_common(config)
        return kind, Shape.model_validate({**common, **STANDARD_ARCHITECTURES[kind].read(config)})
    except KeyError as error:
        raise ModelError(f"config.json: {error.args[0]!r} is missing") from None
    except ValidationError as error:
        raise ModelError(f"config.json: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def find_standard(shape: Shape) -> str:
    """Return the first architecture that a shape matches, or "" for our own.

    A match requires that the written config, read again, gives the same shape.
    """

    def is_lossless(kind: str) -> bool:
        try:
            read = parse_shape({"model_type": kind, **STANDARD_ARCHITECTURES[kind].write(shape)})[1].resolve()
        except ModelError:
            return False
        own = shape.resolve()

        def equal(a: Any, b: Any) -> bool:
            return math.isclose(a, b) if isinstance(b, float) else a == b

        return all(equal(read[name], value) for name, value in own.items())

    return next(
        (name for name, standard in STANDARD_ARCHITECTURES.items() if standard.matches(shape) and is_lossless(name)), ""
    )
