"""Fold a LoRA adapter into a model's weights: W + s B A, of DoRA with each row at its learned length; computed in fp32. The one place that does this.

A base that was kept in 4 bits while the adapter was trained is taken as those bits say: the adapter corrects their error, too. Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmworks.errors import ModelError
from llmworks.model.adapter import PREFIX, base_of, read_adapter, scale_of
from llmworks.model.nf4 import pack, unpack

PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


@dataclass(frozen=True)
class Folded:
    """Layers that were adapted; of a base in 4 bits the root of the mean square of what its bits lost, as a share of the weights'."""

    layers: int
    base_error: float = 0.0


class Fold:
    """What an adapter does to each layer's weight. Holds the adapter alone; what is added to a weight is computed when its turn comes.

    Errors: ModelError when a tensor of the adapter has no weight in the model, whose shapes `shape_of(layer name)` says, or one of another shape: known before anything is folded.
    """

    def __init__(self, adapter: Path, shape_of: Callable[[str], Sequence[int] | None]) -> None:
        config, tensors = read_adapter(adapter)
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part = next((p for p in PARTS if name.endswith("." + p)), None)
            if part is None:
                raise ModelError(f"{adapter}: the tensor {name} is no part of a plain LoRA")
            found.setdefault(name.removeprefix(PREFIX).removesuffix("." + part), {})[part] = tensor.float()
        kept = base_of(adapter)
        self._double, self._in_bits = bool(kept.get("double")), set(kept.get("layers", ()))
        self._parts: dict[str, tuple[Tensor, Tensor, float, Tensor | None]] = {}  # A, B, scale, magnitude
        for layer, parts in found.items():
            a, b = parts.get(PARTS[0]), parts.get(PARTS[1])
            if a is None or b is None:
                raise ModelError(f"{adapter}: {layer} has an {'A and no B' if b is None else 'B and no A'} matrix; copy the adapter again")
            if bool(config.get("use_dora")) != (PARTS[2] in parts):
                raise ModelError(f"{adapter}: {layer} has {'no' if config.get('use_dora') else 'a'} lora_magnitude_vector, and adapter_config.json says use_dora: {str(bool(config.get('use_dora'))).lower()}")
            self._parts[layer] = a, b, scale_of(config, layer, len(a)), parts.get(PARTS[2])
        self.layers = [*self._parts, *sorted(self._in_bits - set(self._parts))]
        for layer in self.layers:
            shape = shape_of(layer)
            if shape is None:
                raise ModelError(f"{adapter}: belongs to another model: this one has no layer {layer}")
            wanted = (len(self._parts[layer][1]), self._parts[layer][0].shape[1]) if layer in self._parts else tuple(shape)
            if tuple(shape) != wanted:
                raise ModelError(f"{adapter}: belongs to another model: {layer} has the shape {tuple(shape)} here, {wanted} there")
        self._lost = self._whole = 0.0

    @torch.no_grad()
    def folded(self, layer: str, weight: Tensor) -> Tensor:
        """A layer's weight with the adapter in it, in the weight's number format."""
        base = weight.float()
        if layer in self._in_bits:
            bits = unpack(pack(base, double=self._double))
            self._lost, self._whole = self._lost + float((bits - base).square().sum()), self._whole + float(base.square().sum())
            base = bits
        if layer in self._parts:
            a, b, scale, magnitude = self._parts[layer]
            base = base + (b @ a) * scale
            if magnitude is not None:
                base = base * (magnitude / torch.linalg.norm(base, dim=1))[:, None]
        return base.to(weight.dtype)

    def result(self) -> Folded:
        """Of all that was folded."""
        return Folded(len(self._parts), (self._lost / self._whole) ** 0.5 if self._whole else 0.0)


def fold_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> Folded:
    """Add the adapter at `adapter` to the weights that `weight_of(layer name)` gives, in place. Errors: those of Fold; nothing is half folded."""

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
