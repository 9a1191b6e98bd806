"""Read and write LoRA adapters in peft's format: `adapter_model.safetensors` and `adapter_config.json`.

`base.json` is added where the base was quantized during training (QLoRA).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.core.errors import ModelError
from llmworks.model.lora.lora import LoraSettings, Rename, iter_lora_layers
from llmworks.tokenize.load import read_json

PREFIX = "base_model.model."
TENSOR_SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
BASE_FILE = "base.json"
Json = dict[str, Any]
PLAIN_KEYS = (
    *("peft_type", "task_type", "peft_version", "revision", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
)  # keys of adapter_config.json that are read, or that do not change what a plain LoRA computes
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
BASE_CHANGING_INITS = ("pissa", "olora")  # subtract a product that can be computed from the base alone


def get_adapter_state(model: nn.Module, rename: Rename = str) -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's names."""
    out: dict[str, Tensor] = {}
    for name, layer in iter_lora_layers(model):
        stem = f"{PREFIX}{rename(name)}"
        out[f"{stem}.lora_A.weight"] = layer.a.detach().clone()
        out[f"{stem}.lora_B.weight"] = layer.b.detach().clone()
        if layer.magnitude is not None:
            out[f"{stem}.lora_magnitude_vector"] = layer.magnitude.detach().clone()
    return out


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor], rename: Rename = str) -> None:
    """Copy saved tensors into the adapted layers; every layer must be present."""
    with torch.no_grad():
        for name, layer in iter_lora_layers(model):
            stem = f"{PREFIX}{rename(name)}"
            layer.a.copy_(tensors[f"{stem}.lora_A.weight"])
            layer.b.copy_(tensors[f"{stem}.lora_B.weight"])
            if layer.magnitude is not None:
                layer.magnitude.copy_(tensors[f"{stem}.lora_magnitude_vector"])


def save_adapter(
    model: nn.Module,
    out: Path,
    lora: LoraSettings,
    *,
    base_name: str,
    rename: Rename = str,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter in peft's format. `base`: how the base was quantized during training."""
    from safetensors.torch import save_file

    names = sorted({rename(name).rpartition(".")[2] for name, _ in iter_lora_layers(model)})
    config: Json = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }
    save_file(get_adapter_state(model, rename), out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base:
        (out / BASE_FILE).write_text(json.dumps(dict(base), indent=2) + "\n", encoding="utf-8")


def read_adapter(path: Path, *, has_base: bool = False) -> tuple[Json, dict[str, Tensor]]:
    """Read (config, tensors) of a peft LoRA directory.

    `has_base`: whether the caller subtracts what the initialization took from the base (`compute_initial_product`).
    ModelError for another method, or an unsupported option.
    """
    from safetensors.torch import load_file

    config = read_json(path / "adapter_config.json")
    if config.get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise ModelError(
            f"{path}: is a soft prompt (prompt or prefix tuning), which cannot be merged into the weights; use it as an"
            " adapter (llmworks chat, evaluate)"
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    file = path / "adapter_model.safetensors"
    if not file.exists():
        raise ModelError(
            f"{path}: has no {file.name}"
            + (
                "; adapter_model.bin is a pickle, which can run arbitrary code when loaded: save it again in peft with"
                " safe_serialization"
                if file.with_suffix(".bin").exists()
                else "; it is not a peft adapter directory"
            )
        )
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors raises its own kind for a truncated file
        raise ModelError(f"{path}: the adapter cannot be read ({error}); copy it again") from None
    if not (isinstance(config.get("r"), int) and config["r"] > 0 and _is_number(config.get("lora_alpha"))):
        raise ModelError(f"{path}/adapter_config.json: needs a rank `r` greater than zero and a number `lora_alpha`")
    for key in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(key) or {}
        if not (
            isinstance(pattern, dict) and all(_is_number(v) and _is_pattern(layer) for layer, v in pattern.items())
        ):
            raise ModelError(f"{path}/adapter_config.json: {key} must map patterns of layer names to numbers")
    unknown = [key for key, value in config.items() if value and key not in PLAIN_KEYS]
    if unknown or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: the adapter uses {unknown[0] if unknown else 'bias'}, which is not supported")
    _check_initialization(path, config.get("init_lora_weights", True), has_base=has_base)
    return config, tensors


def _check_initialization(path: Path, init: Any, *, has_base: bool) -> None:
    """Raise ModelError for an initialization that changed the base in a way that is not undone."""
    init = init.lower() if isinstance(init, str) else init
    if init in PLAIN_INITS or (has_base and init in BASE_CHANGING_INITS):
        return
    convert = "save it in peft with save_pretrained(..., path_initial_model_for_weight_conversion=...) as a plain LoRA"
    if init in BASE_CHANGING_INITS:
        raise ModelError(
            f"{path}: init_lora_weights is {init!r}, which changed the weights of the base; merge it into its base"
            f" first (llmworks merge adapter), or {convert}"
        )
    raise ModelError(
        f"{path}: init_lora_weights is {init!r}, which changed the weights of the base in a way that the adapter does"
        f" not record; {convert}"
    )


def compute_initial_product(init: Any, weight: Tensor, rank: int, scale: float) -> Tensor | None:
    """Return what peft subtracted from a base weight [out, in] before training; None for plain initializations.

    PiSSA (arXiv:2404.02948): the best approximation of the rank. OLoRA (arXiv:2406.01775): scale * Q R of the first
    `rank` columns and rows of the QR decomposition.
    """
    init = init.lower() if isinstance(init, str) else init
    if init == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        approximation: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
        return approximation
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        product: Tensor = q[:, :rank] @ r[:rank]
        return scale * product
    return None


@dataclass(frozen=True)
class LoraMatrices:
    """LoRA matrices of one layer, fp32: its update is scale * B A; with DoRA also the magnitude of each row."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    magnitude: Tensor | None = None  # [out]


def read_lora_matrices(path: Path, label: str = "", *, has_base: bool = False) -> tuple[Json, dict[str, LoraMatrices]]:
    """Read (config, LoRA matrices by layer) of a peft LoRA directory. `label`: its name in messages, else its path.

    `has_base`: as in `read_adapter`.

    Errors: ModelError for what `read_adapter` rejects, a tensor that is not part of a plain LoRA, matrices that do not
    match, and values that are NaN or infinite.
    """
    config, tensors = read_adapter(path, has_base=has_base)
    name, tensors_by_layer = label or str(path), dict[str, dict[str, Tensor]]()
    for key, tensor in tensors.items():
        part = next((p for p in TENSOR_SUFFIXES if key.endswith("." + p)), None)
        if part is None:
            raise ModelError(f"{name}: the tensor {key} is not part of a plain LoRA")
        tensors_by_layer.setdefault(key.removeprefix(PREFIX).removesuffix("." + part), {})[part] = tensor.float()
    if not tensors_by_layer:
        raise ModelError(f"{name}: has no LoRA matrices")
    dora = bool(config.get("use_dora"))
    matrices = {}
    for layer, parts in tensors_by_layer.items():
        a, b, magnitude = (parts.get(part) for part in TENSOR_SUFFIXES)
        if a is None or b is None:
            raise ModelError(
                f"{name}: {layer} {'has an A but no B matrix' if b is None else 'has no A matrix'}; copy the adapter"
                " again"
            )
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise ModelError(
                f"{name}: {layer}: A {list(a.shape)} and B {list(b.shape)} are not two matrices of the same rank; copy"
                " the adapter again"
            )
        if len(a) != (rank := get_rank(config, layer)):
            raise ModelError(
                f"{name}: {layer} has matrices of rank {len(a)}, but adapter_config.json has r: {rank} for it, which"
                " decides their scale; restore the config that the adapter was saved with"
            )
        if dora != (magnitude is not None):
            raise ModelError(
                f"{name}: {layer} has {'no' if dora else 'a'} lora_magnitude_vector, but adapter_config.json has"
                f" use_dora: {str(dora).lower()}"
            )
        if magnitude is not None and magnitude.shape != (len(b),):
            raise ModelError(
                f"{name}: {layer}: lora_magnitude_vector {list(magnitude.shape)} does not match {len(b)} rows; copy the"
                " adapter again"
            )
        if not all(math.isfinite(float(one.sum(dtype=torch.float64))) for one in parts.values()):
            raise ModelError(f"{name}: {layer} holds values that are NaN or infinite")
        matrices[layer] = LoraMatrices(a, b, compute_scale(config, layer, len(a)), magnitude)
    return config, matrices


def compute_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return a layer's LoRA scale: alpha / r, or alpha / sqrt(r) (rsLoRA).

    `alpha_pattern` may override alpha for it, matched as in peft's `get_pattern_key`.
    """
    alpha = float(_get_by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def get_rank(config: Mapping[str, Any], layer: str) -> int:
    """Return a layer's rank according to the config: `r`, or that of a pattern in `rank_pattern`."""
    return int(_get_by_pattern(config.get("rank_pattern"), layer, config["r"]))


def _get_by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer's name, as peft's `get_pattern_key`."""
    return next((v for p, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({p})", layer)), default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def read_base_quantization(path: Path) -> Json:
    """Return how the base was quantized during training of the adapter: {} = not, else
    `{"kept": "nf4", "double": ..., "layers": [...]}`.

    ModelError for anything else.
    """
    file = path / BASE_FILE
    settings = read_json(file) if file.exists() else {}
    if settings and not (settings.get("kept") == "nf4" and isinstance(settings.get("layers"), list)):
        raise ModelError(
            f"{file}: says that the base was quantized as {settings.get('kept')!r}; only nf4, with its layers,"
            " is supported"
        )
    return settings
