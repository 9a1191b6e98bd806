"""Adapters on disk, in peft's format: `adapter_model.safetensors`, `adapter_config.json`, and `base.json` where the base was kept in fewer bits while it was trained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.errors import ModelError
from llmworks.model.lora import Lora, Rename, layers
from llmworks.tokenize.load import read_json

PREFIX = "base_model.model."
BASE = "base.json"
Json = dict[str, Any]
UNKNOWN = ("modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices", "use_qalora", "use_bdlora", "target_parameters")


def state(model: nn.Module, rename: Rename = str) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names."""
    out: dict[str, Tensor] = {}
    for name, layer in layers(model):
        stem = f"{PREFIX}{rename(name)}"
        out[f"{stem}.lora_A.weight"] = layer.a.detach().clone()
        out[f"{stem}.lora_B.weight"] = layer.b.detach().clone()
        if layer.magnitude is not None:
            out[f"{stem}.lora_magnitude_vector"] = layer.magnitude.detach().clone()
    return out


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], rename: Rename = str) -> None:
    """Put saved tensors back into the adapted layers; every layer must be there."""
    with torch.no_grad():
        for name, layer in layers(model):
            stem = f"{PREFIX}{rename(name)}"
            layer.a.copy_(tensors[f"{stem}.lora_A.weight"])
            layer.b.copy_(tensors[f"{stem}.lora_B.weight"])
            if layer.magnitude is not None:
                layer.magnitude.copy_(tensors[f"{stem}.lora_magnitude_vector"])


def save_adapter(model: nn.Module, out: Path, lora: Lora, *, base_name: str, rename: Rename = str, base: Mapping[str, Any] | None = None) -> None:
    """Write the adapter as peft reads it. `base`: how the base was kept while the adapter was trained."""
    from safetensors.torch import save_file

    names = sorted({rename(name).rpartition(".")[2] for name, _ in layers(model)})
    config: Json = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": names, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": lora.stabilised, "use_dora": lora.magnitudes,
    }  # fmt: skip
    save_file(state(model, rename), out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base:
        (out / BASE).write_text(json.dumps(dict(base), indent=2) + "\n", encoding="utf-8")


def read_adapter(path: Path) -> tuple[Json, dict[str, Tensor]]:
    """(config, tensors) of a peft LoRA directory. ModelError for another method, or an option that is not known here."""
    from safetensors.torch import load_file

    config = read_json(path / "adapter_config.json")
    if config.get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise ModelError(f"{path}: is a soft prompt, which stands before texts and cannot be folded into weights; use it as it is (llmworks chat, evaluate)")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is known here")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"{path}: not a peft adapter directory (no {Path(str(error.filename)).name})") from None
    except Exception as error:  # safetensors raises its own kind for a truncated file
        raise ModelError(f"{path}: the adapter cannot be read ({error}); copy it again") from None
    if not (isinstance(config.get("r"), int) and config["r"] > 0 and isinstance(config.get("lora_alpha"), (int, float))):
        raise ModelError(f"{path}/adapter_config.json: needs a rank `r` above zero and `lora_alpha`")
    unknown = [key for key in UNKNOWN if config.get(key)]
    if unknown or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: the adapter uses {unknown[0] if unknown else 'bias'}, which is not known here")
    return config, tensors


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor of a layer's product: alpha / r, or alpha / sqrt(r); `alpha_pattern` may name another alpha for it, as peft's `get_pattern_key` looks for it."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def base_of(path: Path) -> Json:
    """How the base was kept while the adapter at `path` was trained: {} for as it is, else `{"kept": "nf4", "double": ..., "layers": [...]}`. ModelError for anything else."""
    file = path / BASE
    found = read_json(file) if file.exists() else {}
    if found and not (found.get("kept") == "nf4" and isinstance(found.get("layers"), list)):
        raise ModelError(f"{file}: says that the base was kept as {found.get('kept')!r}; only nf4, with its layers, is known here")
    return found
