"""Read and write bitsandbytes' 4-bit checkpoints (NF4 or FP4, blocks of 64), which transformers and peft load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.nf4 import BLOCK, BOOKS, SCALES, Packed, dynamic_map, pack, unpack

METHOD = "bitsandbytes"
PARTS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


@dataclass(frozen=True)
class Levels:
    """4-bit data type of the weights. `double_quant`: double quantization, block scales in 8 bits."""

    book: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    bits: int = 4
    group: int = BLOCK
    symmetric: bool = True
    inputs: None = None


@dataclass(frozen=True)
class Matrix:
    """A matrix quantized to 4 bits."""

    packed: Packed
    grid: Levels

    def weight(self) -> Tensor:
        """Dequantize to [rows, columns], fp32."""
        return unpack(self.packed)

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return self.packed.bits


def matrix_of(weight: Tensor, grid: Levels) -> Matrix:
    """Quantize a matrix [rows, columns] to the nearest levels. ModelError for weights that are NaN or infinite."""
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are NaN or infinite")
    return Matrix(pack(weight, double=grid.double, book=grid.book), grid)


def tensors_of(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """Return the tensors of a quantized layer `name`."""
    packed, grid = matrix.packed, matrix.grid
    said: dict[str, Any] = {
        "quant_type": grid.book,
        "blocksize": BLOCK,
        "dtype": grid.stored,
        "shape": list(packed.shape),
    }
    found = {
        f"{name}.weight": packed.codes[:, None].contiguous(),
        f"{name}.weight.absmax": packed.scales.contiguous(),
        f"{name}.weight.quant_map": torch.tensor(BOOKS[grid.book], dtype=torch.float32),
    }
    if packed.second is not None:
        said |= {"nested_blocksize": SCALES, "nested_dtype": "float32", "nested_offset": packed.mean}
        found |= {
            f"{name}.weight.nested_absmax": packed.second,
            f"{name}.weight.nested_quant_map": dynamic_map().clone(),
        }
    found[f"{name}.weight.quant_state.bitsandbytes__{grid.book}"] = torch.tensor(
        list(json.dumps(said).encode()), dtype=torch.uint8
    )
    return found


def config_of(grids: Mapping[str, Levels], left: Sequence[str]) -> dict[str, Any]:
    """Build `quantization_config`; `ignored`: layers that are not quantized."""
    grid = next(iter(grids.values()))
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": grid.book,
        "bnb_4bit_use_double_quant": grid.double,
        "bnb_4bit_compute_dtype": grid.stored,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(left),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Matrix | Tensor]]:
    """Yield (name, tensor or quantized matrix) of a directory's weights. ModelError for tensors that do not match."""
    for name, tensor in tensors.items():
        if name.endswith(PARTS):
            continue
        state = next(
            (
                f"{name}.quant_state.bitsandbytes__{book}"
                for book in BOOKS
                if f"{name}.quant_state.bitsandbytes__{book}" in tensors
            ),
            None,
        )
        if state is None:
            if tensor.dtype == torch.uint8:
                raise ModelError(f"{name}: has no quant_state, which defines its 4-bit data type")
            yield name, tensor
            continue
        packed = _read(tensors, name, state)
        yield name, Matrix(packed, Levels("fp4" if packed.book == "fp4" else "nf4", packed.second is not None))


def _read(tensors: Mapping[str, Tensor], name: str, state: str) -> Packed:
    try:
        said = json.loads(bytes(tensors[state].tolist()))
        shape = tuple(int(n) for n in said["shape"])
        count = int(torch.Size(shape).numel())
        second = tensors[f"{name}.nested_absmax"] if "nested_blocksize" in said else None
        if second is not None and len(second) != -(-len(tensors[f"{name}.absmax"]) // SCALES):
            raise ValueError(f"{len(second)} second-level scales")
        packed = Packed(
            tensors[name].view(torch.uint8).flatten(),
            tensors[f"{name}.absmax"],
            shape,
            second,
            float(said.get("nested_offset", 0.0)),
            str(said["quant_type"]),
        )
        if int(said["blocksize"]) != BLOCK or (second is not None and int(said["nested_blocksize"]) != SCALES):
            raise ModelError(f"{name}: blocksize {said['blocksize']} is not supported, only {BLOCK}")
        if len(packed.codes) != -(-count // 2) or len(packed.scales) != -(-count // BLOCK) or packed.book not in BOOKS:
            raise ValueError(f"{len(packed.codes)} bytes, {len(packed.scales)} scales, shape {shape}")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{name}: its tensors do not match ({error})") from None
    return packed


def reading_of(config: Mapping[str, Any], name: str) -> None:
    """Return None: inputs are not quantized."""
