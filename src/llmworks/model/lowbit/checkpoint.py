"""A quantized directory's weights as plain ones, and what its layers read, by the form that its config names.

Knows no method of quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.core.errors import ModelError
from llmworks.model.lowbit import bnb_4bit as four_bits
from llmworks.model.lowbit import bnb_int8 as mixed_int8
from llmworks.model.lowbit import compressed_tensors as compressed
from llmworks.model.lowbit import gptq_awq as gptq_layout
from llmworks.model.lowbit import hqq as hqq_layout
from llmworks.model.lowbit.activations import read_rounded
from llmworks.model.lowbit.linear import LowBitLinear

FORMS: dict[str, Any] = {
    "compressed-tensors": compressed,
    "bitsandbytes-int8": mixed_int8,
    "bitsandbytes-4bit": four_bits,
    "gptq": gptq_layout.Gptq,
    "awq": gptq_layout.Awq,
    "hqq": hqq_layout,
}  # each: tensors_of, config_of, weights, reading_of


BROKEN = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
)  # what nonsense in a config or a tensor comes to


def form_of(config: Mapping[str, Any]) -> Any:
    """The form of a `quantization_config`. ModelError for one that is not known."""
    if not isinstance(config, Mapping):
        raise ModelError(f"config.json: quantization_config must be an object, not {type(config).__name__}")
    method = str(config.get("quant_method"))
    if method == mixed_int8.METHOD:
        return mixed_int8 if config.get("load_in_8bit") else four_bits
    if method not in FORMS:
        raise ModelError(
            f"config.json: weights quantized by {method!r} cannot be read here; known: {compressed.METHOD},"
            f" {mixed_int8.METHOD}, gptq, awq, hqq"
        )
    return FORMS[method]


def dense(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a directory as plain weights, fp32.

    `config`: its `quantization_config`. ModelError for a form that is not known, or tensors that do not belong
    together.
    """
    return {name: plain(what) for name, what in weights(tensors, config)}


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, what it is: a tensor, or a matrix with `weight()`) of a directory's weights, one after the other.

    `config`, errors: as of `dense`.
    """
    try:
        yield from form_of(config).weights(tensors, config)
    except BROKEN as error:
        raise ModelError(
            f"config.json: its quantization_config, or a tensor that it is for, cannot be read ({type(error).__name__}:"
            f" {error})"
        ) from None


def plain(what: Any) -> Tensor:
    """As a tensor in memory of its own (not the pages of a file), fp32 where it is of floats."""
    if isinstance(what, Tensor):
        return what.to(torch.float32 if what.is_floating_point() else what.dtype, copy=True)
    try:
        made: Tensor = what.weight()
    except BROKEN as error:
        raise ModelError(f"a quantized matrix cannot be read ({type(error).__name__}: {error})") from None
    return made.float()


def round_inputs(
    model: nn.Module, config: Mapping[str, Any], rename: Callable[[str], str], quantized: Container[str], head: str = ""
) -> None:
    """Let those layers read rounded inputs of which a `quantization_config` says so.

    `rename`: from the decoder's names to those of the config; `quantized`: the layers, by the config's names, whose
    weights are no plain ones in the files: others read as ever;

    `head`: what stands before the names of the model's layers in the decoder.
    """
    form = form_of(config)
    for name, layer in model.named_modules():
        whole = f"{head}{name}"
        if not isinstance(layer, (nn.Linear, LowBitLinear)) or rename(whole) not in quantized:
            continue
        try:
            reading = form.reading_of(config, rename(whole))
        except BROKEN as error:
            raise ModelError(
                f"config.json: its quantization_config cannot be read ({type(error).__name__}: {error})"
            ) from None
        if reading is not None:
            read_rounded(layer, reading)
