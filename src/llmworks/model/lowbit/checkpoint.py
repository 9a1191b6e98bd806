"""Read a quantized directory: dequantize its weights and set up input quantization, in any supported format."""

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
from llmworks.model.lowbit.activations import quantize_inputs
from llmworks.model.lowbit.linear import LowBitLinear

FORMATS: dict[str, Any] = {
    "compressed-tensors": compressed,
    "bitsandbytes-int8": mixed_int8,
    "bitsandbytes-4bit": four_bits,
    "gptq": gptq_layout.GptqFormat,
    "awq": gptq_layout.AwqFormat,
    "hqq": hqq_layout,
}  # each has tensors_of, config_of, weights, get_input_quantization


INVALID_DATA_ERRORS = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
)  # what an invalid config or tensor raises


def get_format(config: Mapping[str, Any]) -> Any:
    """Return the format module of a `quantization_config`. ModelError for an unsupported one."""
    if not isinstance(config, Mapping):
        raise ModelError(f"config.json: quantization_config must be an object, not {type(config).__name__}")
    method = str(config.get("quant_method"))
    if method == mixed_int8.METHOD:
        return mixed_int8 if config.get("load_in_8bit") else four_bits
    if method not in FORMATS:
        raise ModelError(
            f"config.json: weights quantized by {method!r} are not supported; supported: {compressed.METHOD},"
            f" {mixed_int8.METHOD}, gptq, awq, hqq"
        )
    return FORMATS[method]


def dequantize_all(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Dequantize all tensors of a directory to fp32.

    `config`: its `quantization_config`. ModelError for an unsupported format, or tensors that do not match.
    """
    return {name: to_dense(what) for name, what in iter_weights(tensors, config)}


def iter_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor or matrix with `weight()`) of a directory's weights, one at a time.

    `config`, errors: as in `dequantize_all`.
    """
    try:
        yield from get_format(config).weights(tensors, config)
    except INVALID_DATA_ERRORS as error:
        raise ModelError(
            f"config.json: its quantization_config, or a tensor it describes, is invalid ({type(error).__name__}:"
            f" {error})"
        ) from None


def to_dense(what: Any) -> Tensor:
    """Copy a tensor or dequantize a matrix into own memory (not memory-mapped); floats become fp32."""
    if isinstance(what, Tensor):
        return what.to(torch.float32 if what.is_floating_point() else what.dtype, copy=True)
    try:
        weight: Tensor = what.weight()
    except INVALID_DATA_ERRORS as error:
        raise ModelError(f"a quantized matrix cannot be read ({type(error).__name__}: {error})") from None
    return weight.float()


def apply_input_quantization(
    model: nn.Module,
    config: Mapping[str, Any],
    rename: Callable[[str], str],
    quantized: Container[str],
    prefix: str = "",
) -> None:
    """Enable input quantization of the layers for which a `quantization_config` requests it.

    `rename`: from the decoder's names to those of the config; `quantized`: layers, by the config's names, with
    quantized weights in the files; others are left unchanged.

    `prefix`: prefix of the model's layer names in the decoder.
    """
    form = get_format(config)
    for name, layer in model.named_modules():
        whole = f"{prefix}{name}"
        if not isinstance(layer, (nn.Linear, LowBitLinear)) or rename(whole) not in quantized:
            continue
        try:
            reading = form.get_input_quantization(config, rename(whole))
        except INVALID_DATA_ERRORS as error:
            raise ModelError(
                f"config.json: its quantization_config cannot be read ({type(error).__name__}: {error})"
            ) from None
        if reading is not None:
            quantize_inputs(layer, reading)
