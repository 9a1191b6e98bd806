"""How a Llama-shaped Hugging Face model is laid out in a GGUF file: names, the Q/K row order, configuration and tokenizer keys.

One table for both directions (`from_gguf`, `to_gguf`). Knows nothing of quantization. Layout: llama.cpp's
`convert_hf_to_gguf.py` (class LlamaModel) and the GGUF specification.
"""

from __future__ import annotations

import numpy as np

# (name in the GGUF block, name in the Hugging Face layer)
BLOCK_NAMES: tuple[tuple[str, str], ...] = (
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
)
OUTER_NAMES: tuple[tuple[str, str], ...] = (
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)

# beside the above in Qwen2's layout, which is only read
BIAS_NAMES: tuple[tuple[str, str], ...] = tuple((f"attn_{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv")

# GGUF `tokenizer.ggml.token_type` values
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def to_gguf_name(name: str) -> str | None:
    """The GGUF name of a Hugging Face parameter, or None when the layout has no place for it."""
    for gguf_name, hf_name in OUTER_NAMES:
        if name == hf_name:
            return gguf_name
    if name.startswith("model.layers."):
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        for gguf_name, hf_name in BLOCK_NAMES:
            if rest == hf_name:
                return f"blk.{index}.{gguf_name}"
    return None


def to_hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None when it is derived data (such as `rope_freqs.weight`)."""
    for gguf_name, hf_name in OUTER_NAMES:
        if name == gguf_name:
            return hf_name
    if name.startswith("blk."):
        index, _, rest = name.removeprefix("blk.").partition(".")
        for gguf_name, hf_name in (*BLOCK_NAMES, *BIAS_NAMES):
            if rest == gguf_name:
                return f"model.layers.{index}.{hf_name}"
    return None


def heads_of(name: str, heads: int, kv_heads: int) -> int | None:
    """The number of heads whose rows are interleaved in this tensor, or None for one that is stored as it is."""
    if name.endswith(("attn_q.weight", "q_proj.weight")):
        return heads
    if name.endswith(("attn_k.weight", "k_proj.weight")):
        return kv_heads
    return None


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face row order (halves) to llama.cpp's (pairs): [heads * dim, in] -> the same shape."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, 2, dim // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave_rows`: [heads * dim, in] -> the same shape."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, dim // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
