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
from llmworks.model.lora.adapter_io import compute_initial_product, read_base_quantization, read_lora_matrices
from llmworks.model.lowbit.nf4 import pack_4bit, unpack_4bit


@dataclass(frozen=True)
class AdapterMergeResult:
    """Result of merging: the number of adapted layers, and `base_error`, the relative RMS quantization error of a 4-bit
    base.
    """

    layers: int
    base_error: float = 0.0


class AdapterMerger:
    """Merger of an adapter, layer by layer.

    Holds only the adapter; each weight's update is computed on demand.

    Errors: ModelError when the model has no layer for a tensor of the adapter, or one of another shape
    (`shape_of(layer name)` returns a layer's shape); raised before anything is merged. ModelError for merged weights
    that are NaN or infinite. `label`: the adapter's name in messages.
    """

    def __init__(self, adapter: Path, shape_of: Callable[[str], Sequence[int] | None], label: str = "") -> None:
        config, self._matrices = read_lora_matrices(adapter, label, has_base=True)
        self._init = config.get("init_lora_weights", True)
        base_quantization, name = read_base_quantization(adapter), label or str(adapter)
        self._double_quant, self._quantized_layers, self._name = (
            bool(base_quantization.get("double")),
            set(base_quantization.get("layers", ())),
            name,
        )
        self.layers = [*self._matrices, *sorted(self._quantized_layers - set(self._matrices))]
        for layer in self.layers:
            shape = shape_of(layer)
            if shape is None:
                raise ModelError(f"{name}: belongs to another model: this model has no layer {layer}")
            wanted = (
                (len(self._matrices[layer].b), self._matrices[layer].a.shape[1])
                if layer in self._matrices
                else tuple(shape)
            )
            if tuple(shape) != wanted:
                raise ModelError(
                    f"{name}: belongs to another model: {layer} has shape {tuple(shape)} in the model, {wanted} in"
                    " the adapter"
                )
        self._squared_error = self._squared_norm = 0.0

    @torch.no_grad()
    def merge_layer(self, layer: str, weight: Tensor) -> Tensor:
        """Return a layer's weight with the adapter merged, in the weight's number format."""
        base = weight.float()
        if layer in self._quantized_layers:
            dequantized = unpack_4bit(pack_4bit(base, double_quant=self._double_quant))
            self._squared_error, self._squared_norm = (
                self._squared_error + float((dequantized - base).square().sum()),
                self._squared_norm + float(base.square().sum()),
            )
            base = dequantized
        if layer in self._matrices:
            matrices = self._matrices[layer]
            product = compute_initial_product(self._init, base, len(matrices.a), matrices.scale)
            if product is not None:  # in the weight's precision, as peft keeps the residual
                base = (base - product).to(weight.dtype).float()
            base = base + (matrices.b @ matrices.a) * matrices.scale
            if matrices.magnitude is not None:
                base = base * (matrices.magnitude / torch.linalg.norm(base, dim=1))[:, None]
        merged = base.to(weight.dtype)
        if not math.isfinite(float(merged.sum(dtype=torch.float64))):
            raise ModelError(
                f"{self._name}: merged into {layer}, it gives values that are NaN, infinite, or too large for"
                f" {str(weight.dtype).removeprefix('torch.')}"
            )
        return merged

    def get_result(self) -> AdapterMergeResult:
        """Return the result for all merged layers."""
        return AdapterMergeResult(
            len(self._matrices), (self._squared_error / self._squared_norm) ** 0.5 if self._squared_norm else 0.0
        )


def merge_adapter_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> AdapterMergeResult:
    """Merge the adapter at `adapter` into the weights that `weight_of(layer name)` returns, in place.

    Errors: those of AdapterMerger; shapes are checked before anything is merged.
    """

    def shape_of(layer: str) -> Sequence[int] | None:
        weight = weight_of(layer)
        return None if weight is None else weight.shape

    merger = AdapterMerger(adapter, shape_of)
    for layer in merger.layers:
        weight = weight_of(layer)
        assert weight is not None
        with torch.no_grad():
            weight.copy_(merger.merge_layer(layer, weight))
    return merger.get_result()


def make_weight_lookup(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Return a function that looks up a linear layer's weight in a loaded model."""
    modules = dict(model.named_modules())

    def weight_of(layer: str) -> Tensor | None:
        module = modules.get(layer)
        return module.weight if isinstance(module, nn.Linear) else None

    return weight_of
