"""The decoder as the architectures that others know: Llama, Mistral, Qwen2, Qwen3, Gemma 3 and GPT-2.

A shape that is one of theirs is saved under that name and loads in plain transformers; any other is saved as what it
is. Knows no other family, and refuses a config that has what the shape has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmworks.core.errors import ModelError
from llmworks.model.nn.decoder import DecoderConfig
from llmworks.model.shape import Rope, Shape

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
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh"}
OURS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh"}


@dataclass(frozen=True)
class Standard:
    """One architecture: its name in config.json, the names of its tensors, and how its config is read and written."""

    architecture: str
    names: Mapping[str, str]
    read: Callable[[Json], Json]  # fields of a shape beside those that all have
    write: Callable[[Shape], Json]
    is_shape: Callable[[Shape], bool]


def _rope(config: Json, layers: str = "") -> Json:
    """The rotary positions of a config, in either of transformers' forms."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layers and isinstance(given, dict) and layers in given:
        given = given[layers] or {}
    if not isinstance(given, dict):
        raise ModelError(f"config.json: rope_parameters must be an object, not {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama-3"}
    if kind not in known:
        raise ModelError(f"config.json: rotary positions of the type {kind!r} are not known; known: {', '.join(known)}")
    if given.get("truncate") is False:
        raise ModelError("config.json: rope_parameters.truncate false is not known here")
    if (
        given.get("attention_factor") is not None
        or given.get("mscale")
        or given.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ModelError(
            "config.json: rope_parameters has attention_factor, mscale or partial_rotary_factor, which the decoder does"
            " not have"
        )
    rope: Json = {
        "theta": float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "scaling": known[kind],
    }
    if kind != "default":
        rope |= {"factor": float(given["factor"]), "trained": int(given.get("original_max_position_embeddings") or 0)}
    if kind == "yarn":
        rope |= {"fast": float(given.get("beta_fast") or 32), "slow": float(given.get("beta_slow") or 1)}
    if kind == "llama3":
        rope |= {"fast": float(given["high_freq_factor"]), "slow": float(given["low_freq_factor"])}
    return rope


def _rope_out(rope: Rope, context: int) -> Json:
    kinds = {"none": "default", "linear": "linear", "yarn": "yarn", "llama-3": "llama3"}
    out: Json = {"rope_type": kinds[rope.scaling], "rope_theta": rope.theta}
    if rope.scaling != "none":
        out["factor"] = rope.factor
    if rope.scaling in ("yarn", "llama-3"):
        out["original_max_position_embeddings"] = rope.trained or int(context / rope.factor)
    if rope.scaling == "yarn":
        out |= {"beta_fast": rope.fast, "beta_slow": rope.slow}
    if rope.scaling == "llama-3":
        out |= {"high_freq_factor": rope.fast, "low_freq_factor": rope.slow}
    return out


def _common(config: Json) -> Json:
    """What all but GPT-2 call the same."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in OURS:
        raise ModelError(f"config.json: the activation {activation!r} is not known; known: {', '.join(OURS)}")
    return {
        "vocabulary": config["vocab_size"],
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or 0,
        "hidden": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "norm_epsilon": config["rms_norm_eps"],
        "activation": OURS[activation],
        "tied": config.get("tie_word_embeddings", False),
    }


def _common_out(shape: Shape) -> Json:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.per_head,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_epsilon,
        "hidden_act": ACTIVATIONS[shape.activation],
        "tie_word_embeddings": shape.tied,
        "rope_parameters": _rope_out(shape.rope, shape.context),
        "attention_dropout": 0.0,
    }


def _llama(config: Json) -> Json:
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise ModelError("config.json: attention_bias without mlp_bias (or the reverse) is no shape of the decoder")
    return {"rope": _rope(config), "bias": "all" if config.get("attention_bias") else "none"}


def _windowed(config: Json) -> Json:
    """Qwen's window, which only the later layers may have."""
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        raise ModelError("config.json: layer_types differ from layer to layer, which is no shape of the decoder")
    if not config.get("use_sliding_window"):
        return {}
    if config.get("max_window_layers", 0) > 0:
        raise ModelError("config.json: a window in the last layers only (max_window_layers) is no shape of the decoder")
    return {"window": config.get("sliding_window") or 0}


def _gemma(config: Json) -> Json:
    layers = config.get("layer_types") or []
    pattern = config.get("sliding_window_pattern") or (
        layers.index("full_attention") + 1 if "full_attention" in layers else 6
    )
    wanted = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    if (layers and layers != wanted) or config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        raise ModelError("config.json: layer_types out of turn, or soft caps, are no shape of the decoder")
    if config.get("use_bidirectional_attention"):
        raise ModelError(
            "config.json: use_bidirectional_attention is no shape of the decoder, whose tokens see only what is before"
            " them"
        )
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return {
        "norm_place": "around",
        "norm_from_zero": True,
        "qk_norm": True,
        "embedding_scaled": True,
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "window": config["sliding_window"],
        "full_every": pattern,
        "rope": _rope(config, "full_attention"),
        "window_theta": float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0),
        "tied": config.get("tie_word_embeddings", True),
    }


def _gemma_out(shape: Shape) -> Json:
    out = _common_out(shape)
    return out | {
        "hidden_activation": out.pop("hidden_act"),
        "query_pre_attn_scalar": round(shape.attention_scale**-2) if shape.attention_scale else shape.per_head,
        "sliding_window": shape.window,
        "layer_types": ["sliding_attention" if shape.window_of(i) else "full_attention" for i in range(shape.layers)],
        "rope_parameters": {
            "full_attention": _rope_out(shape.rope, shape.context),
            "sliding_attention": {"rope_type": "default", "rope_theta": shape.window_theta or shape.rope.theta},
        },
    }


def _gpt2(config: Json) -> Json:
    if (
        config.get("scale_attn_by_inverse_layer_idx")
        or not config.get("scale_attn_weights", True)
        or config.get("n_inner") == 0
    ):
        raise ModelError("config.json: attention scaled by layer, or not at all, is no shape of the decoder")
    return {
        "vocabulary": config["vocab_size"],
        "width": config["n_embd"],
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "hidden": config.get("n_inner") or 4 * config["n_embd"],
        "context": config["n_positions"],
        "norm": "layer",
        "norm_epsilon": config["layer_norm_epsilon"],
        "position": "learned",
        "activation": OURS[config["activation_function"]],
        "gated": False,
        "bias": "all",
        "tied": config.get("tie_word_embeddings", True),
    }


def _gpt2_out(shape: Shape) -> Json:
    return {
        "vocab_size": shape.vocabulary,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.inner,
        "n_positions": shape.context,
        "layer_norm_epsilon": shape.norm_epsilon,
        "activation_function": {**ACTIVATIONS, "gelu-tanh": "gelu_new"}[shape.activation],
        "tie_word_embeddings": shape.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _usual(shape: Shape) -> bool:
    """RMSNorm before each part, rotary positions, a gate, no experts: what Llama's kin share."""
    plain = (
        shape.norm == "rms"
        and shape.norm_place == "pre"
        and not shape.norm_from_zero
        and shape.position == "rope"
        and shape.gated
        and not shape.experts
        and shape.rope.scaling != "ntk"
    )
    return plain and not shape.embedding_scaled and not shape.attention_scale and not shape.full_every


STANDARDS: dict[str, Standard] = {
    "llama": Standard(
        "LlamaForCausalLM",
        LLAMA_NAMES,
        _llama,
        lambda s: _common_out(s) | {"attention_bias": s.bias == "all", "mlp_bias": s.bias == "all"},
        lambda s: _usual(s) and s.bias in ("none", "all") and not s.qk_norm and not s.window,
    ),
    "mistral": Standard(
        "MistralForCausalLM",
        LLAMA_NAMES,
        lambda c: {"rope": _rope(c), "window": c.get("sliding_window") or 0},
        lambda s: _common_out(s) | {"sliding_window": s.window or None},
        lambda s: _usual(s) and s.bias == "none" and not s.qk_norm,
    ),
    "qwen2": Standard(
        "Qwen2ForCausalLM",
        LLAMA_NAMES,
        lambda c: {"rope": _rope(c), "bias": "qkv", **_windowed(c)},
        lambda s: (
            _common_out(s)
            | {
                "use_sliding_window": bool(s.window),
                "sliding_window": s.window or None,
                "max_window_layers": 0,
            }
        ),
        lambda s: _usual(s) and s.bias == "qkv" and not s.qk_norm,
    ),
    "qwen3": Standard(
        "Qwen3ForCausalLM",
        LLAMA_NAMES,
        lambda c: {
            "rope": _rope(c),
            "qk_norm": True,
            "bias": "qkv" if c.get("attention_bias") else "none",
            **_windowed(c),
        },
        lambda s: (
            _common_out(s)
            | {
                "attention_bias": False,
                "use_sliding_window": bool(s.window),
                "sliding_window": s.window or None,
                "max_window_layers": 0,
            }
        ),
        lambda s: _usual(s) and s.bias == "none" and s.qk_norm,
    ),
    "gemma3_text": Standard(
        "Gemma3ForCausalLM",
        GEMMA_NAMES,
        _gemma,
        _gemma_out,
        lambda s: (
            s.norm == "rms"
            and s.norm_place == "around"
            and s.norm_from_zero
            and s.qk_norm
            and s.embedding_scaled
            and s.position == "rope"
            and s.gated
            and s.bias == "none"
            and bool(s.window and s.full_every)
            and not s.experts
            and s.rope.scaling != "ntk"
        ),
    ),
    "gpt2": Standard(
        "GPT2LMHeadModel",
        GPT2_NAMES,
        _gpt2,
        _gpt2_out,
        lambda s: (
            s.norm == "layer"
            and s.norm_place == "pre"
            and s.position == "learned"
            and not s.gated
            and s.bias == "all"
            and s.groups == s.heads
            and not s.head_width
            and not (s.qk_norm or s.window or s.experts or s.embedding_scaled or s.attention_scale)
        ),
    ),
}


def shape_of(config: Json) -> tuple[str, Shape]:
    """(name of the architecture, its shape) of a config.json.

    ModelError for one that is not known, or has what the decoder has not.
    """
    kind = str(config.get("model_type"))
    if kind == DecoderConfig.model_type:
        return "", Shape.model_validate(config["shape"])
    if kind not in STANDARDS:
        raise ModelError(f"config.json: the architecture {kind!r} is not known here; known: {', '.join(STANDARDS)}")
    try:
        return kind, Shape.model_validate(
            {**({} if kind == "gpt2" else _common(config)), **STANDARDS[kind].read(config)}
        )
    except KeyError as error:
        raise ModelError(f"config.json: {error.args[0]!r} is missing") from None
    except ValidationError as error:
        raise ModelError(f"config.json: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def standard_of(shape: Shape) -> str:
    """The first architecture that the shape is one of, or "" for a shape of its own: one whose config, read again, is
    not the same shape.
    """

    def comes_back(kind: str) -> bool:
        try:
            read = shape_of({"model_type": kind, **STANDARDS[kind].write(shape)})[1].settled()
        except ModelError:
            return False
        own = shape.settled()

        def equal(a: Any, b: Any) -> bool:
            return math.isclose(a, b) if isinstance(b, float) else a == b

        return all(equal(read[name], value) for name, value in own.items())

    return next((name for name, standard in STANDARDS.items() if standard.is_shape(shape) and comes_back(name)), "")
