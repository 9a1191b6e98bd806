"""A quantized directory's weights as plain ones, and what its layers read, by the form that its config names. Knows no method of quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from llmworks.errors import ModelError
from llmworks.model import compressed, mixed_int8
from llmworks.model.rounded_inputs import read_rounded

FORMS: dict[str, Any] = {compressed.METHOD: compressed, mixed_int8.METHOD: mixed_int8}


def _form(config: Mapping[str, Any]) -> Any:
    method = str(config.get("quant_method"))
    if method not in FORMS:
        raise ModelError(f"config.json: weights quantized by {method!r} cannot be read here; known: {', '.join(FORMS)}")
    return FORMS[method]


def dense(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a directory as plain weights, fp32. `config`: its `quantization_config`. ModelError for a form that is not known, or tensors that do not belong together."""
    found: dict[str, Tensor] = _form(config).dense(tensors, config)
    return found


def round_inputs(model: nn.Module, config: Mapping[str, Any], rename: Callable[[str], str], head: str = "") -> None:
    """Let those layers read rounded inputs of which a `quantization_config` says so. `rename`: from the decoder's names to those of the config; `head`: what stands before the names of the model's layers in the decoder."""
    form = _form(config)
    for name, layer in model.named_modules():
        whole = f"{head}{name}"
        reading = form.reading_of(config, rename(whole)) if isinstance(layer, nn.Linear) and whole != "head" else None
        if reading is not None:
            read_rounded(layer, reading)
