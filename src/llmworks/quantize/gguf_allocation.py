"""Number formats of a GGUF file's tensors by what each would cost the model, within the size that the file's type has by itself. Knows no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.context import Context
from llmworks.model.gguf_layout import to_gguf_name
from llmworks.quantize.gguf_file import encoded
from llmworks.quantize.gguf_types import SEEING, bits_of, fitting
from llmworks.quantize.sensing import costs
from llmworks.quantize.solvers.allocation import allocate
from llmworks.quantize.source import Source

CHOICES = ("Q2_K", "IQ3_S", "Q3_K", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")


def allocated(source: Source, ids: Tensor, ctx: Context, types: Mapping[str, str], importance: Mapping[str, Any]) -> tuple[dict[str, str], float]:
    """(formats of the blocks' matrices by their names, that together are no larger than `types`; the divergence that is expected). ids: texts by which costs are found."""
    kinds: dict[str, list[str]] = {}
    sizes: dict[str, list[float]] = {}

    def tries(layer: str, weight: Tensor) -> Sequence[Tensor]:
        name = to_gguf_name(f"{layer}.weight")
        if name is None or name not in types or (types[name] in SEEING and name not in importance):
            return []
        kinds[name] = sorted({fitting(kind, weight.shape[1]) for kind in CHOICES}, key=bits_of)
        sizes[name] = [weight.numel() * bits_of(kind) for kind in kinds[name]]
        return [restored(weight, kind, importance.get(name)) for kind in kinds[name]]

    found = {to_gguf_name(f"{layer}.weight") or "": cost for layer, cost in costs(source, ids, ctx, tries).items() if cost}
    if not kinds:  # all was found before a stop
        for number in range(source.shape.layers):
            for layer, tensor in source.tensors(number).items():
                name = to_gguf_name(layer) or ""
                if name in found:
                    kinds[name] = sorted({fitting(kind, tensor.shape[1]) for kind in CHOICES}, key=bits_of)
                    sizes[name] = [tensor.numel() * bits_of(kind) for kind in kinds[name]]
    return _chosen(found, kinds, sizes, types)


def _chosen(found: Mapping[str, Sequence[float]], kinds: Mapping[str, Sequence[str]], sizes: Mapping[str, Sequence[float]], types: Mapping[str, str]) -> tuple[dict[str, str], float]:
    names = list(found)
    budget = sum(sizes[name][0] / bits_of(kinds[name][0]) * bits_of(types[name]) for name in names)
    rows: list[tuple[list[str], list[float], list[float]]] = []
    for name in names:
        best: dict[float, tuple[float, str]] = {}
        for kind, size, cost in zip(kinds[name], sizes[name], found[name], strict=True):
            best[size] = min(best.get(size, (math.inf, "")), (cost, kind))
        rows.append(([best[size][1] for size in sorted(best)], [best[size][0] for size in sorted(best)], sorted(best)))
    smallest = sum(row[2][0] for row in rows)
    choices = allocate([row[1] for row in rows], [row[2] for row in rows], max(budget, smallest))
    return {name: row[0][at] for name, row, at in zip(names, rows, choices, strict=True)}, sum(row[1][at] for row, at in zip(rows, choices, strict=True))


def restored(weight: Tensor, kind: str, importance: Any) -> Tensor:
    """A matrix in a format, and back."""
    from libgguf import GGMLQuantizationType, dequantize_rows

    made = encoded(weight.detach().numpy(), kind, importance)
    return torch.from_numpy(made.astype("float32") if kind in ("F32", "F16") else dequantize_rows(made, GGMLQuantizationType[kind]))
