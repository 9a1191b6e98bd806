"""Map tensors between Hugging Face and GGUF layouts by architecture: names, row order of Q and K, norm offsets.

One table for both directions (`from_gguf`, `to_gguf`). Layout: llama.cpp's `convert_hf_to_gguf.py` and the GGUF
specification.
"""

from __future__ import annotations

from dataclasses import dataclass

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

BIAS_NAMES: tuple[tuple[str, str], ...] = tuple((f"attn_{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv")
QK_NORMS = (("attn_q_norm.weight", "self_attn.q_norm.weight"), ("attn_k_norm.weight", "self_attn.k_norm.weight"))
SANDWICH_NORMS = (
    ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
)


@dataclass(frozen=True)
class GgufLayout:
    """Layout of one architecture: GGUF name, class in config.json, tensor names in a block (GGUF, Hugging Face).

    `interleaved`: rows of Q and K are in pairs; `unit_offset`: Hugging Face norm weights are those of GGUF minus one.
    """

    architecture: str
    model_class: str
    names: tuple[tuple[str, str], ...]
    interleaved: bool = False
    unit_offset: bool = False


FUSED = (("attn_qkv.weight", "self_attn.qkv_proj.weight"), ("ffn_up.weight", "mlp.gate_up_proj.weight"))
LAYOUTS: dict[str, GgufLayout] = {  # by model_type
    "llama": GgufLayout("llama", "LlamaForCausalLM", BLOCK_NAMES, interleaved=True),
    "mistral": GgufLayout("llama", "MistralForCausalLM", BLOCK_NAMES, interleaved=True),
    "qwen2": GgufLayout("qwen2", "Qwen2ForCausalLM", (*BLOCK_NAMES, *BIAS_NAMES)),
    "qwen3": GgufLayout("qwen3", "Qwen3ForCausalLM", (*BLOCK_NAMES, *QK_NORMS)),
    "gemma3_text": GgufLayout(
        "gemma3",
        "Gemma3ForCausalLM",
        (*(pair for pair in BLOCK_NAMES if pair[0] != "ffn_norm.weight"), *QK_NORMS, *SANDWICH_NORMS),
        unit_offset=True,
    ),
    "phi3": GgufLayout(
        "phi3",
        "Phi3ForCausalLM",
        (
            *(
                pair
                for pair in BLOCK_NAMES
                if not pair[0].startswith(("attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up."))
            ),
            *FUSED,
        ),
    ),
}
MODEL_TYPES = {
    layout.architecture: kind for kind, layout in reversed(LAYOUTS.items())
}  # model_type by a file's architecture

# GGUF `tokenizer.ggml.token_type` values
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def to_gguf_name(name: str, model_type: str = "llama") -> str | None:
    """Return the GGUF name of a Hugging Face parameter, or None when the architecture's layout does not have it.

    Matrices have the same names in all architectures but phi3.
    """
    for gguf_name, hf_name in OUTER_NAMES:
        if name == hf_name:
            return gguf_name
    if name.startswith("model.layers."):
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        for gguf_name, hf_name in LAYOUTS[model_type].names:
            if rest == hf_name:
                return f"blk.{index}.{gguf_name}"
    return None


def to_hf_name(name: str, model_type: str = "llama") -> str | None:
    """Return the Hugging Face name of a GGUF tensor, or None for derived data (such as `rope_freqs.weight`)."""
    for gguf_name, hf_name in OUTER_NAMES:
        if name == gguf_name:
            return hf_name
    if name.startswith("blk."):
        index, _, rest = name.removeprefix("blk.").partition(".")
        for gguf_name, hf_name in LAYOUTS[model_type].names:
            if rest == gguf_name:
                return f"model.layers.{index}.{hf_name}"
    return None


def get_interleaved_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """Return the number of heads whose rows are interleaved in this tensor, or None for a tensor stored as it is."""
    if name.endswith(("attn_q.weight", "q_proj.weight")):
        return heads
    if name.endswith(("attn_k.weight", "k_proj.weight")):
        return kv_heads
    return None


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Convert Hugging Face row order (halves) to llama.cpp's (pairs): [heads * dim, in] -> the same shape."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, 2, dim // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Invert `interleave_rows`: [heads * dim, in] -> the same shape."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, dim // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
