"""Fold a LoRA adapter into a model's weights: W + s B A, of DoRA with each row at its learned length; computed in fp32.

The one place that does this.

A base that was kept in 4 bits while the adapter was trained is taken as those bits say: the adapter corrects their
error, too. Knows no training.
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
    """Layers that were adapted; of a base in 4 bits the root of the mean square of what its bits lost, as a share of
    the weights'.
    """

    layers: int
    base_error: float = 0.0


class Fold:
    """What an adapter does to each layer's weight.

    Holds the adapter alone; what is added to a weight is computed when its turn comes.

    Errors: ModelError when a tensor of the adapter has no weight in the model, whose shapes `shape_of(layer name)`
    says, or one of another shape: known before anything is folded; and for weights that are no numbers then. `called`:
    how messages call the adapter.
    """

    def __init__(self, adapter: Path, shape_of: Callable[[str], Sequence[int] | None], called: str = "") -> None:
        _, self._parts = read_factors(adapter, called)
        kept, name = base_of(adapter), called or str(adapter)
        self._double, self._in_bits, self._name = bool(kept.get("double")), set(kept.get("layers", ())), name
        self.layers = [*self._parts, *sorted(self._in_bits - set(self._parts))]
        for layer in self.layers:
            shape = shape_of(layer)
            if shape is None:
                raise ModelError(f"{name}: belongs to another model: this one has no layer {layer}")
            wanted = (
                (len(self._parts[layer].b), self._parts[layer].a.shape[1]) if layer in self._parts else tuple(shape)
            )
            if tuple(shape) != wanted:
                raise ModelError(
                    f"{name}: belongs to another model: {layer} has the shape {tuple(shape)} here, {wanted} there"
                )
        self._lost = self._whole = 0.0

    @torch.no_grad()
    def folded(self, layer: str, weight: Tensor) -> Tensor:
        """A layer's weight with the adapter in it, in the weight's number format."""
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
                f"{self._name}: folded into {layer}, it makes values that are no numbers, or that"
                f" {str(weight.dtype).removeprefix('torch.')} cannot hold"
            )
        return made

    def result(self) -> Folded:
        """Of all that was folded."""
        return Folded(len(self._parts), (self._lost / self._whole) ** 0.5 if self._whole else 0.0)


def fold_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> Folded:
    """Add the adapter at `adapter` to the weights that `weight_of(layer name)` gives, in place.

    Errors: those of Fold; nothing is half folded.
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
    """Look up a linear layer's weight in a loaded model."""
    modules = dict(model.named_modules())

    def weight_of(layer: str) -> Tensor | None:
        module = modules.get(layer)
        return module.weight if isinstance(module, nn.Linear) else None

    return weight_of
