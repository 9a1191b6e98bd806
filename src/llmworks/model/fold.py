"""Fold a LoRA adapter into a model's weights: W + s B A, of DoRA with each row at its learned length; computed in fp32. The one place that does this.

A base that was kept in 4 bits while the adapter was trained is taken as those bits say: the adapter corrects their error, too. Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable
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


def fold_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> Folded:
    """Add the adapter at `adapter` to the weights that `weight_of(layer name)` gives, in place.

    Errors: ModelError when a tensor of the adapter has no weight in the model, or another shape: nothing is half folded.
    """
    config, tensors = read_adapter(adapter)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((p for p in PARTS if name.endswith("." + p)), None)
        if part is None:
            raise ModelError(f"{adapter}: the tensor {name} is no part of a plain LoRA")
        found.setdefault(name.removeprefix(PREFIX).removesuffix("." + part), {})[part] = tensor.float()
    kept = base_of(adapter)
    in_bits = set(kept.get("layers", ()))
    work: list[tuple[Tensor, Tensor | None, Tensor | None, bool]] = []  # weight, addition, magnitude, whether it was in 4 bits
    for layer, parts in found.items():
        a, b = parts.get(PARTS[0]), parts.get(PARTS[1])
        if a is None or b is None:
            raise ModelError(f"{adapter}: {layer} has an {'A and no B' if b is None else 'B and no A'} matrix; copy the adapter again")
        if bool(config.get("use_dora")) != (PARTS[2] in parts):
            raise ModelError(f"{adapter}: {layer} has {'no' if config.get('use_dora') else 'a'} lora_magnitude_vector, and adapter_config.json says use_dora: {str(bool(config.get('use_dora'))).lower()}")
        weight = _weight(weight_of, layer, adapter)
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ModelError(f"{adapter}: belongs to another model: {layer} has the shape {tuple(weight.shape)} here, {(b.shape[0], a.shape[1])} there")
        work.append((weight, (b @ a) * scale_of(config, layer, len(a)), parts.get(PARTS[2]), layer in in_bits))
    work += [(_weight(weight_of, layer, adapter), None, None, True) for layer in sorted(in_bits - set(found))]
    lost = whole = 0.0
    with torch.no_grad():
        for weight, delta, magnitude, packed in work:
            base = weight.float()
            if packed:
                bits = unpack(pack(base, double=bool(kept.get("double"))))
                lost, whole = lost + float((bits - base).square().sum()), whole + float(base.square().sum())
                base = bits
            made = base if delta is None else base + delta
            if magnitude is not None:
                made = made * (magnitude / torch.linalg.norm(made, dim=1))[:, None]
            weight.copy_(made.to(weight.dtype))
    return Folded(len(found), (lost / whole) ** 0.5 if whole else 0.0)


def _weight(weight_of: Callable[[str], Tensor | None], layer: str, adapter: Path) -> Tensor:
    weight = weight_of(layer)
    if weight is None:
        raise ModelError(f"{adapter}: belongs to another model: this one has no layer {layer}")
    return weight


def weights_of(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Look up a linear layer's weight in a loaded model."""
    modules = dict(model.named_modules())

    def weight_of(layer: str) -> Tensor | None:
        module = modules.get(layer)
        return module.weight if isinstance(module, nn.Linear) else None

    return weight_of
