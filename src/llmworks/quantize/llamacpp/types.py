"""Quantization format of each tensor of a GGUF file, by the file's type: llama.cpp's mixes (`llama_tensor_get_type`),
for dense models.

Does not know weights.

A file's type names the format of most matrices; the most sensitive ones have more bits. Rows that are not a multiple of
a format's block size get a fallback format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

FileType = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "iq3_m",
    "iq3_s",
    "iq3_xs",
    "iq3_xxs",
    "q2_k",
    "q2_k_s",
    "iq2_m",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
    "iq1_m",
    "iq1_s",
]
FILE_TYPES: tuple[str, ...] = get_args(FileType)
PLAIN = ("F32", "F16", "BF16")
FORMATS = (
    *PLAIN,
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
)  # formats of a tensor
BASE = {
    "iq3_xs": "IQ3_S",
    "iq3_m": "IQ3_S",
    "iq2_s": "IQ2_XS",
    "iq2_m": "IQ2_S",
}  # file types whose most common format has another name
LARGE = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_XS",
)  # blocks of 256 weights, like K-quants
FALLBACK = {
    **dict.fromkeys(LARGE, "IQ4_NL"),
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
REQUIRE_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")  # require an importance matrix
SMALL = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")


@dataclass(frozen=True)
class MixParameters:
    """What the mixes depend on: `layers`; `gqa_ratio`: query heads per key-value head; `tied`: tied embeddings;
    `importance`: whether there is an importance matrix.
    """

    layers: int
    gqa_ratio: int
    tied: bool
    importance: bool = False


def get_base_format(kind: str) -> str:
    """Return the format that most matrices of a file have."""
    return BASE.get(kind) or re.sub(r"(?<=_K)_[SML]$", "", kind.upper())


def assign_formats(
    shapes: Mapping[str, tuple[int, ...]], kind: str, layout: MixParameters, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return each tensor's format by its name.

    shapes: in numpy's order, rows last. overrides: formats by a regex on tensor names, which take precedence.
    """
    return {name: _assign_format(name, shape, kind, layout, overrides or {}) for name, shape in shapes.items()}


def _assign_format(
    name: str, shape: tuple[int, ...], kind: str, layout: MixParameters, overrides: Mapping[str, str]
) -> str:
    if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
        return "F32"
    wanted = next((found.upper() for pattern, found in overrides.items() if re.search(pattern, name)), None)
    if wanted is None:
        base = get_base_format(kind)
        if base in PLAIN:
            return base
        wanted = _get_embedding_or_head_format(name, shape[-1], kind, base, layout) or _get_block_matrix_format(
            name, kind, base, layout
        )
    if wanted in PLAIN:
        return wanted
    return get_fitting_format(wanted, shape[-1])


def get_block_size(kind: str) -> int:
    """Return the number of weights in a block of a format."""
    return 1 if kind in PLAIN else 256 if kind.endswith("_K") or kind in LARGE else 32


def get_bits_per_weight(kind: str) -> float:
    """Return the bits per weight, scales included."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return float(size * 8 / block)


def get_fitting_format(kind: str, row: int) -> str:
    """Return a format, or its fallback if its block size does not divide a row."""
    if row % get_block_size(kind) == 0:
        return kind
    other = FALLBACK.get(kind, kind)
    return other if row % get_block_size(other) == 0 else "F16"


def _get_embedding_or_head_format(name: str, row: int, kind: str, base: str, layout: MixParameters) -> str | None:
    """Return the format of the head or the embedding; None for any other tensor."""
    if name == "output.weight" or (name == "token_embd.weight" and layout.tied):
        if row % get_block_size(base):
            return "Q8_0"
        if kind in (*SMALL, "iq3_xxs"):
            return "Q5_K"
        return base if base == "Q8_0" else "Q6_K"
    if name == "token_embd.weight":
        return {
            "iq2_xxs": "Q2_K",
            "iq2_xs": "Q2_K",
            "iq1_s": "Q2_K",
            "iq1_m": "Q2_K",
            "iq2_s": "IQ3_S",
            "iq2_m": "IQ3_S",
            "iq3_xxs": "IQ3_S",
        }.get(kind, base)
    return None


def use_more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer is in the first or last eighth, or every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _get_block_matrix_format(name: str, kind: str, base: str, layout: MixParameters) -> str:
    """Return the format of a matrix of the blocks."""
    found = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
    layer, part, layers = (int(found[1]), found[2], layout.layers) if found else (0, "", layout.layers)
    early = layer < layers // 8
    if kind in SMALL:
        better = "IQ3_S" if kind in ("iq2_s", "iq2_m") else "Q2_K"
        small = {
            "attn_v": "Q4_K" if layout.gqa_ratio >= 4 else better,
            "attn_qkv": "Q4_K" if layout.gqa_ratio >= 4 else better,
            "ffn_down": better if early else base,
        }
        return small.get(part) or (
            {"iq1_s": "IQ2_XXS", "iq1_m": "IQ2_XXS", "iq2_s": "IQ3_S", "iq2_m": "IQ3_S"}.get(kind, base)
            if part == "attn_output"
            else base
        )
    rules: dict[str, Any] = {
        "attn_v": _get_value_format,
        "attn_qkv": _get_value_format,
        "ffn_down": _get_down_proj_format,
    }
    if part in rules:
        made: str = rules[part](kind, base, layer, layout)
        return made
    if part in ("attn_q", "attn_k"):
        return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(kind, base)
    if part == "attn_output":
        return {"q2_k": "Q3_K", "iq3_xxs": "IQ3_S", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K", "iq3_m": "Q4_K"}.get(kind, base)
    if part in ("ffn_gate", "ffn_up") and kind == "iq3_xs" and layers // 8 <= layer < 7 * layers // 8:
        return "IQ3_XXS"
    return base


def _get_value_format(kind: str, base: str, layer: int, layout: MixParameters) -> str:
    shared = layout.gqa_ratio >= 4
    known = {
        "q2_k": "Q4_K" if shared else "Q3_K",
        "iq3_xxs": "Q4_K" if shared else "IQ3_XXS" if layout.importance else "IQ3_S",
        "iq3_m": "Q4_K",
        "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
        "q3_k_l": "Q5_K",
    }
    if kind in known:
        return known[kind]
    if shared and kind in ("q2_k_s", "iq3_xs", "iq3_s"):
        return "Q4_K"
    if shared and kind in ("iq4_nl", "iq4_xs"):
        return "Q5_K"
    if kind in ("q4_k_m", "q5_k_m") and use_more_bits(layer, layout.layers):
        return "Q6_K"
    return "Q5_K" if kind == "q4_k_s" and layer < 4 else base


def _get_down_proj_format(kind: str, base: str, layer: int, layout: MixParameters) -> str:
    layers, early = layout.layers, layer < layout.layers // 8
    if kind in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if use_more_bits(layer, layers) else base
    if kind == "q3_k_m":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    known = {"q2_k": "Q3_K", "q3_k_l": "Q5_K"}
    if kind == "iq3_xxs" and not layout.importance:
        return "Q4_K" if early else "Q3_K"
    first = {"q2_k_s": "Q4_K", "iq3_m": "Q4_K", "q4_k_s": "Q5_K"}
    first |= {"q4_0": "Q4_1", "q5_0": "Q5_1"} if layout.importance else {"iq4_nl": "Q5_K", "iq4_xs": "Q5_K"}
    return known.get(kind) or (first.get(kind, base) if early else base)
