"""LoRA layers: y = W x + s B A x, with A random and B zero, so that training starts from the base model.

s is alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(r), rank-stabilized (rsLoRA; Kalajdzievski 2023,
arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353) also trains the magnitude of each row of W + s B A.
Initialization as in peft's `LoraLayer.reset_lora_parameters`. Files are in `adapter_io.py`, merging into the weights in
`merge_adapter.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.nf4 import NF4Linear

Rename = Callable[[str], str]  # a layer's name in the module -> its name in the model's files


@dataclass(frozen=True)
class LoraSettings:
    """LoRA settings. `use_rslora`: rsLoRA, alpha over the square root of the rank; `use_dora`: DoRA."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """Scale of the update B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class _LoraFunction(torch.autograd.Function):
    """W x + s B A x fused: no second output-sized tensor, and nothing of a frozen W is saved for the backward pass.

    A quantized W is dequantized anew each time.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: Any) -> Tensor:
        """Compute from x: [..., in]; a: [r, in]; b: [out, r] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        low = torch.mm(flat, a.T)
        y = (
            torch.mm(flat, get_dense_weight(base).T)
            if base.bias is None
            else torch.addmm(base.bias, flat, get_dense_weight(base).T)
        )
        y.addmm_(low, b.T, alpha=scale)
        context.save_for_backward(flat, low, a, b)
        context.rest = (scale, base, x.shape)
        return y.view(*x.shape[:-1], len(b))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dX = dY W + s dY B A, dA = s (dY B)' X, dB = s dY' (X A')."""
        flat, low, a, b = context.saved_tensors
        scale, base, shape = context.rest
        grad_y = gradients[0].reshape(-1, len(b))
        grad_low = torch.mm(grad_y, b).mul_(scale)
        grad_x = (
            torch.mm(grad_y, get_dense_weight(base)).addmm_(grad_low, a).view(shape)
            if context.needs_input_grad[0]
            else None
        )
        return grad_x, torch.mm(grad_low.T, flat), torch.mm(grad_y.T, low).mul_(scale), None, None


def get_dense_weight(base: Any) -> Tensor:
    """Return a layer's weight [out, in], dequantized where it is stored in 4 bits."""
    weight: Tensor = base.dequantize() if isinstance(base, NF4Linear) else base.weight
    return weight


class LoraLinear(nn.Module):
    """Frozen linear layer with a trained low-rank update. A: [r, in], B: [out, r]; magnitude (DoRA): [out]."""

    def __init__(self, base: nn.Linear | NF4Linear, lora: LoraSettings) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.disabled = base, lora.scale, lora.dropout, False
        self.a = nn.Parameter(torch.empty(lora.rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, lora.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.magnitude = nn.Parameter(torch.linalg.norm(get_dense_weight(base), dim=1)) if lora.use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute x: [..., in] -> [..., out]; the frozen layer's output if `disabled`."""
        if self.disabled:
            alone: Tensor = self.base(x)
            return alone
        if self.magnitude is not None:
            return self._forward_dora(x, self.magnitude)
        dropping = self.dropout > 0 and self.training
        if not dropping and x.dtype == self.a.dtype and not torch.is_autocast_enabled(x.device.type):
            y: Tensor = _LoraFunction.apply(x, self.a, self.b, self.scale, self.base)  # type: ignore[no-untyped-call]
            return y
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        plain: Tensor = self.base(x)
        return plain + F.linear(F.linear(low, self.a), self.b * self.scale)

    def _forward_dora(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """Compute DoRA: the direction of each row of W + s B A times its trained magnitude.

        The row norm is a constant for the gradient (section 4.3 of the paper).
        """
        weight = get_dense_weight(self.base)
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            length = torch.linalg.norm(weight.to(self.b.dtype) + self.scale * (self.b @ self.a), dim=1)
        straight, added = F.linear(low, weight), F.linear(F.linear(low, self.a), self.b) * self.scale
        share = (magnitude / length).to(x.dtype)
        plain: Tensor = self.base(x)
        y: Tensor = plain + (share - 1) * straight + share * added
        return y


def find_linear_layers(model: nn.Module) -> list[str]:
    """Return the names of all linear layers but the output head."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, NF4Linear)) and module is not head
    ]


def find_target_layers(model: nn.Module, targets: Sequence[str] | str, rename: Rename = str) -> list[str]:
    """Return the names of the linear layers to adapt: all but the output head for "all-linear", else those whose last
    name component in the model's files is listed.
    """
    names = find_linear_layers(model)
    if targets == "all-linear":
        return names
    lasts = {name: rename(name).rpartition(".")[2] for name in names}
    wanted = [name for name in names if lasts[name] in targets]
    missing = sorted(set(targets) - {lasts[name] for name in wanted})
    if missing:
        raise ModelError(
            f"lora.target_modules: the model has no linear layer named {missing[0]!r}; it has"
            f" {', '.join(sorted(set(lasts.values())))}"
        )
    return wanted


def attach_lora(model: nn.Module, targets: Sequence[str] | str, lora: LoraSettings, rename: Rename = str) -> None:
    """Freeze the model and wrap every target in a `LoraLinear`, in place. A is random: seed torch before."""
    names = find_target_layers(model, targets, rename)
    if not names:
        raise ModelError(
            "the model has no linear layer to adapt (GPT-2 in transformers has Conv1D layers); use full fine-tuning"
        )
    attach_lora_to(model, names, lora)


def attach_lora_to(model: nn.Module, names: Sequence[str], lora: LoraSettings) -> None:
    """Freeze the model and wrap the layers of these names in `LoraLinear`."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        base: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LoraLinear(base, lora))


def iter_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (name, layer) of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
