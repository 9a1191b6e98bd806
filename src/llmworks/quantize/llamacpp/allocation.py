"""Allocate quantization formats to a GGUF file's tensors by their cost, within the size that the file's type would
have.

Does not know GGUF files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.core.context import Context
from llmworks.model.gguf.layout import to_gguf_name
from llmworks.model.io.layer_reader import LayerReader
from llmworks.quantize.algorithms.knapsack import allocate
from llmworks.quantize.calibrate.sensitivity import estimate_costs
from llmworks.quantize.llamacpp.types import get_bits_per_weight, get_fitting_format
from llmworks.quantize.llamacpp.writer import encode

CHOICES = ("Q2_K", "IQ3_S", "Q3_K", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")
FormatCosts = Mapping[str, Mapping[str, float]]  # cost of each format for each tensor, in nats per token


def get_candidate_formats(row: int) -> list[str]:
    """Return the formats that a matrix with such rows may have, the smallest first."""
    return sorted(
        {get_fitting_format(kind, row) for kind in CHOICES}, key=lambda kind: (get_bits_per_weight(kind), kind)
    )


def estimate_format_costs(
    source: LayerReader, ids: Tensor, ctx: Context, importance: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Estimate the cost of each format for each matrix of the blocks, by its name in the file.

    ids: sequences for the estimate; importance: as of `compute_importance`, may be empty.
    """
    rows: dict[str, int] = {}
    for name, entry in source.shapes.items():
        rows[name.removesuffix(".weight")] = entry[-1]

    def make_candidates(layer: str, weight: Tensor) -> Sequence[Tensor]:
        name = to_gguf_name(f"{layer}.weight") or ""
        return [
            quantize_and_dequantize(weight, kind, importance.get(name))
            for kind in get_candidate_formats(weight.shape[1])
        ]

    found = estimate_costs(source, ids, ctx, make_candidates)
    return {
        to_gguf_name(f"{layer}.weight") or layer: dict(zip(get_candidate_formats(rows[layer]), cost, strict=True))
        for layer, cost in found.items()
    }


def allocate_formats(
    table: FormatCosts, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> tuple[dict[str, str], float]:
    """Return (formats of a table's tensors, in total no larger than with `types`; the expected KL divergence)."""
    names, rows = list(table), []
    for name in names:
        best: dict[float, tuple[float, str]] = {}
        for kind, cost in table[name].items():
            size = math.prod(shapes[name]) * get_bits_per_weight(kind)
            best[size] = min(best.get(size, (math.inf, "")), (cost, kind))
        rows.append([(size, *best[size]) for size in sorted(best)])
    budget = sum(math.prod(shapes[name]) * get_bits_per_weight(types[name]) for name in names)
    choices = allocate(
        [[cost for _, cost, _ in row] for row in rows],
        [[size for size, _, _ in row] for row in rows],
        max(budget, sum(row[0][0] for row in rows)),
    )
    return {name: row[at][2] for name, row, at in zip(names, rows, choices, strict=True)}, sum(
        row[at][1] for row, at in zip(rows, choices, strict=True)
    )


def quantize_and_dequantize(weight: Tensor, kind: str, importance: Any) -> Tensor:
    """Quantize a matrix to a format and dequantize it."""
    from libgguf import GGMLQuantizationType, dequantize_rows

    made = encode(weight.detach().numpy(), kind, importance)
    return torch.from_numpy(
        made.astype("float32") if kind in ("F32", "F16") else dequantize_rows(made, GGMLQuantizationType[kind])
    )
