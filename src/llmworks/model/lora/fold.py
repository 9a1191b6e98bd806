"""Merge a LoRA adapter into a model's weights: W + s B A; with DoRA each row has its trained magnitude. In fp32.

A base that was quantized to 4 bits in training (QLoRA) is replaced by its dequantized weights, since the adapter was
trained to correct their error too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmworks.core.errors import ModelError
from llmworks.model.lora.adapter_io import base_of, read_factors
from llmworks.model.lowbit.nf4 import pack, unpack


@dataclass(frozen=True)
class Folded:
    """Result of merging: the number of adapted layers, and `base_error`, the relative RMS quantization error of a 4-bit
    base.
    """

    layers: int
    base_error: float = 0.0


class Fold:
    """Merger of an adapter, layer by layer.

    Holds only the adapter; each weight's update is computed on demand.

    Errors: ModelError when the model has no layer for a tensor of the adapter, or one of another shape
    (`shape_of(layer name)` returns a layer's shape); raised before anything is merged. ModelError for merged weights
    that are NaN or infinite. `label`: the adapter's name in messages.
    """

    def __init__(self, adapter: Path, shape_of: Callable[[str], Sequence[int] | None], called: str = "") -> None:
        _, self._parts = read_factors(adapter, called)
        kept, name = base_of(adapter), called or str(adapter)
        self._double, self._in_bits, self._name = bool(kept.get("double")), set(kept.get("layers", ())), name
        self.layers = [*self._parts, *sorted(self._in_bits - set(self._parts))]
        for layer in self.layers:
            shape = shape_of(layer)
            if shape is None:
                raise ModelError(f"{name}: belongs to another model: this model has no layer {layer}")
            wanted = (
                (len(self._parts[layer].b), self._parts[layer].a.shape[1]) if layer in self._parts else tuple(shape)
            )
            if tuple(shape) != wanted:
                raise ModelError(
                    f"{name}: belongs to another model: {layer} has shape {tuple(shape)} in the model, {wanted} in"
                    " the adapter"
                )
        self._lost = self._whole = 0.0

    @torch.no_grad()
    def folded(self, layer: str, weight: Tensor) -> Tensor:
        """Return a layer's weight with the adapter merged, in the weight's number format."""
        base = weight.float()
        if layer in self._in_bits:
            bits = unpack(pack(base, double=self._double))
            self._lost, self._whole = (
                self._lost + float((bits - base).square().sum()),
                self._whole + float(base.square().sum()),
            )
            base = bits
        if layer in self._parts:
            part = self._parts[layer]
            base = base + (part.b @ part.a) * part.scale
            if part.magnitude is not None:
                base = base * (part.magnitude / torch.linalg.norm(base, dim=1))[:, None]
        made = base.to(weight.dtype)
        if not math.isfinite(float(made.sum(dtype=torch.float64))):
            raise ModelError(
                f"{self._name}: merged into {layer}, it gives values that are NaN, infinite, or too large for"
                f" {str(weight.dtype).removeprefix('torch.')}"
            )
        return made

    def result(self) -> Folded:
        """Return the result for all merged layers."""
        return Folded(len(self._parts), (self._lost / self._whole) ** 0.5 if self._whole else 0.0)


def fold_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> Folded:
    """Merge the adapter at `adapter` into the weights that `weight_of(layer name)` returns, in place.

    Errors: those of AdapterMerger; shapes are checked before anything is merged.
    """

    def shape_of(layer: str) -> Sequence[int] | None:
        weight = weight_of(layer)
        return None if weight is None else weight.shape

    fold = Fold(adapter, shape_of)
    for layer in fold.layers:
        weight = weight_of(layer)
        assert weight is not None
        with torch.no_grad():
            weight.copy_(fold.folded(layer, weight))
    return fold.result()


def weights_of(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Return a function that looks up a linear layer's weight in a loaded model."""
    modules = dict(model.named_modules())

    def weight_of(layer: str) -> Tensor | None:
        module = modules.get(layer)
        return module.weight if isinstance(module, nn.Linear) else None

    return weight_of
