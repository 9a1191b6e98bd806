"""LoRA: y = W x + (alpha / r) B A x, with A random and B zero, so that training starts from the model itself.

Adapters are written and read in peft's format. Source: Hu et al. 2021 (arXiv:2106.09685), initialisation as in peft's
`LoraLayer.reset_lora_parameters`. Folding into the weights is `fold.py`; knows no other adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.errors import ModelError
from llmworks.tokenize.load import read_json

PEFT_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank addition. A: [r, in], B: [out, r]."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = dropout
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y: Tensor = self.base(x)
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return y + F.linear(F.linear(low, self.a), self.b * self.scale)


def target_layers(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Names of the linear layers to adapt: all but the output head for "all-linear", else those whose last name is listed."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        return names
    wanted = [name for name in names if name.rpartition(".")[2] in targets]
    missing = sorted(set(targets) - {name.rpartition(".")[2] for name in wanted})
    if missing:
        raise ModelError(
            f"lora.targets: the model has no linear layer named {missing[0]!r}; it has {', '.join(sorted({n.rpartition('.')[2] for n in names}))}"
        )
    return wanted


def attach(model: nn.Module, targets: Sequence[str] | str, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze the model and put a `LoraLinear` around every target, in place. Seed torch before: A is random."""
    model.requires_grad_(False)
    for name in target_layers(model, targets):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(model.get_submodule(name), rank, alpha, dropout))  # type: ignore[arg-type]


def layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names."""
    out: dict[str, Tensor] = {}
    for name, layer in layers(model):
        out[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.a.detach().clone()
        out[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.b.detach().clone()
    return out


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors back into the adapted layers; every layer must be there."""
    with torch.no_grad():
        for name, layer in layers(model):
            layer.a.copy_(tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"])
            layer.b.copy_(tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"])


def save_adapter(model: nn.Module, out: Path, *, rank: int, alpha: float, dropout: float, base_name: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as peft reads them."""
    from safetensors.torch import save_file

    names = sorted({name.rpartition(".")[2] for name, _ in layers(model)})
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank, "lora_alpha": alpha,
        "lora_dropout": dropout, "target_modules": names, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    save_file(state(model), out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a peft LoRA directory. ModelError for another method, or an option that folding does not know."""
    from safetensors.torch import load_file

    config = read_json(path / "adapter_config.json")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"{path}: not a peft adapter directory (no {Path(str(error.filename)).name})") from None
    except Exception as error:  # safetensors raises its own kind for a truncated file
        raise ModelError(f"{path}: the adapter cannot be read ({error}); copy it again") from None
    if not (isinstance(config.get("r"), int) and config["r"] > 0 and isinstance(config.get("lora_alpha"), (int, float))):
        raise ModelError(f"{path}/adapter_config.json: needs a rank `r` above zero and `lora_alpha`")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is known here")
    unknown = [
        key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias") if config.get(key)
    ]
    if unknown or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: the adapter uses {unknown[0] if unknown else 'bias'}, which is not known here")
    return config, tensors
