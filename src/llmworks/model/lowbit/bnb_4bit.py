"""Read and write bitsandbytes' 4-bit checkpoints (NF4 or FP4, blocks of 64), which transformers and peft load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.nf4 import (
    BLOCK_SIZE,
    CODEBOOKS,
    SCALE_BLOCK_SIZE,
    Packed4bit,
    get_dynamic_map,
    pack_4bit,
    unpack_4bit,
)

METHOD = "bitsandbytes"
TENSOR_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


@dataclass(frozen=True)
class Bnb4bitGrid:
    """4-bit data type of the weights. `double_quant`: double quantization, block scales in 8 bits."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    bits: int = 4
    group: int = BLOCK_SIZE
    symmetric: bool = True
    inputs: None = None


@dataclass(frozen=True)
class Bnb4bitMatrix:
    """A matrix quantized to 4 bits."""

    packed: Packed4bit
    grid: Bnb4bitGrid

    def weight(self) -> Tensor:
        """Dequantize to [rows, columns], fp32."""
        return unpack_4bit(self.packed)

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return self.packed.bits


def quantize_4bit(weight: Tensor, grid: Bnb4bitGrid) -> Bnb4bitMatrix:
    """Quantize a matrix [rows, columns] to the nearest levels. ModelError for weights that are NaN or infinite."""
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are NaN or infinite")
    return Bnb4bitMatrix(pack_4bit(weight, double_quant=grid.double_quant, quant_type=grid.quant_type), grid)


def tensors_of(name: str, matrix: Bnb4bitMatrix) -> dict[str, Tensor]:
    """Return the tensors of a quantized layer `name`."""
    packed, grid = matrix.packed, matrix.grid
    quant_state: dict[str, Any] = {
        "quant_type": grid.quant_type,
        "blocksize": BLOCK_SIZE,
        "dtype": grid.stored,
        "shape": list(packed.shape),
    }
    tensors = {
        f"{name}.weight": packed.codes[:, None].contiguous(),
        f"{name}.weight.absmax": packed.scales.contiguous(),
        f"{name}.weight.quant_map": torch.tensor(CODEBOOKS[grid.quant_type], dtype=torch.float32),
    }
    if packed.nested_scales is not None:
        quant_state |= {
            "nested_blocksize": SCALE_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": packed.nested_offset,
        }
        tensors |= {
            f"{name}.weight.nested_absmax": packed.nested_scales,
            f"{name}.weight.nested_quant_map": get_dynamic_map().clone(),
        }
    tensors[f"{name}.weight.quant_state.bitsandbytes__{grid.quant_type}"] = torch.tensor(
        list(json.dumps(quant_state).encode()), dtype=torch.uint8
    )
    return tensors


def config_of(grids: Mapping[str, Bnb4bitGrid], ignored: Sequence[str]) -> dict[str, Any]:
    """Build `quantization_config`; `ignored`: layers that are not quantized."""
    grid = next(iter(grids.values()))
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": grid.quant_type,
        "bnb_4bit_use_double_quant": grid.double_quant,
        "bnb_4bit_compute_dtype": grid.stored,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(ignored),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Bnb4bitMatrix | Tensor]]:
    """Yield (name, tensor or quantized matrix) of a directory's weights. ModelError for tensors that do not match."""
    for name, tensor in tensors.items():
        if name.endswith(TENSOR_SUFFIXES):
            continue
        state = next(
            (
                f"{name}.quant_state.bitsandbytes__{book}"
                for book in CODEBOOKS
                if f"{name}.quant_state.bitsandbytes__{book}" in tensors
            ),
            None,
        )
        if state is None:
            if tensor.dtype == torch.uint8:
                raise ModelError(f"{name}: has no quant_state, which defines its 4-bit data type")
            yield name, tensor
            continue
        packed = _read_matrix(tensors, name, state)
        yield (
            name,
            Bnb4bitMatrix(
                packed, Bnb4bitGrid("fp4" if packed.quant_type == "fp4" else "nf4", packed.nested_scales is not None)
            ),
        )


def _read_matrix(tensors: Mapping[str, Tensor], name: str, state: str) -> Packed4bit:
    try:
        quant_state = json.loads(bytes(tensors[state].tolist()))
        shape = tuple(int(n) for n in quant_state["shape"])
        count = int(torch.Size(shape).numel())
        second = tensors[f"{name}.nested_absmax"] if "nested_blocksize" in quant_state else None
        if second is not None and len(second) != -(-len(tensors[f"{name}.absmax"]) // SCALE_BLOCK_SIZE):
            raise ValueError(f"{len(second)} second-level scales")
        packed = Packed4bit(
            tensors[name].view(torch.uint8).flatten(),
            tensors[f"{name}.absmax"],
            shape,
            second,
            float(quant_state.get("nested_offset", 0.0)),
            str(quant_state["quant_type"]),
        )
        if int(quant_state["blocksize"]) != BLOCK_SIZE or (
            second is not None and int(quant_state["nested_blocksize"]) != SCALE_BLOCK_SIZE
        ):
            raise ModelError(f"{name}: blocksize {quant_state['blocksize']} is not supported, only {BLOCK_SIZE}")
        if (
            len(packed.codes) != -(-count // 2)
            or len(packed.scales) != -(-count // BLOCK_SIZE)
            or packed.quant_type not in CODEBOOKS
        ):
            raise ValueError(f"{len(packed.codes)} bytes, {len(packed.scales)} scales, shape {shape}")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{name}: its tensors do not match ({error})") from None
    return packed


def get_input_quantization(config: Mapping[str, Any], name: str) -> None:
    """Return None: inputs are not quantized."""
