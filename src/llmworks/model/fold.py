"""Fold a LoRA adapter into a model's weights: W + (alpha / r) B A, computed in fp32. The one place that does this; knows no training and no file but the adapter's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.errors import ModelError
from llmworks.model.lora import PEFT_PREFIX, read_adapter


def scale_of(config: dict[str, Any]) -> float:
    """The factor of the product: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def fold_into(weight_of: Callable[[str], Tensor | None], adapter: Path) -> int:
    """Add the adapter at `adapter` to the weights that `weight_of(layer name)` gives, in place; returns how many changed.

    Errors: ModelError when a tensor of the adapter has no weight in the model, or another shape: nothing is half folded.
    """
    config, tensors = read_adapter(adapter)
    scale = scale_of(config)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight"):
                raise ModelError(f"{adapter}: the tensor {name} is no part of a plain LoRA")
            continue
        layer = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(name.replace("lora_A", "lora_B"))
        if b is None:
            raise ModelError(f"{adapter}: {layer} has an A and no B matrix; copy the adapter again")
        weight = weight_of(layer)
        if weight is None:
            raise ModelError(f"{adapter}: belongs to another model: this one has no layer {layer}")
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ModelError(
                f"{adapter}: belongs to another model: {layer} has the shape {tuple(weight.shape)} here, {(b.shape[0], a.shape[1])} there"
            )
        pairs.append((weight, a, b))
    with torch.no_grad():
        for weight, a, b in pairs:
            delta = (b.float() @ a.float()) * scale
            weight.copy_((weight.float() + delta).to(weight.dtype))
    return len(pairs)


def weights_of(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Look up a linear layer's weight in a loaded model."""
    modules = dict(model.named_modules())

    def weight_of(layer: str) -> Tensor | None:
        module = modules.get(layer)
        return module.weight if isinstance(module, nn.Linear) else None

    return weight_of
