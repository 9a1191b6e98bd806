"""Read and write HQQ checkpoints in safetensors, as the package hqq stores them and vLLM loads them.

Integers with real-valued zero points. Each group of a row is a row of its own: `W_q` [rows * groups / parts, size]
packs the codes of several parts of all groups in one byte (3 bits: ten parts in an int32); `scale` and `zero`
[rows * groups, 1]; a weight is (code - zero) * scale with codes from 0. Further settings of a layer are stored as
tensors beside them. Only groups along rows (axis 1) are supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales

METHOD = "hqq"
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
SHIFTS: dict[str, tuple[int, ...]] = {
    "8bit_u8": (0,),
    "4bit_u8": (4, 0),
    "3bit_32": tuple(range(27, -1, -3)),
    "2bit_u8": (6, 4, 2, 0),
}  # shift of each part
SETTINGS = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
    "quant_scale",
    "quant_zero",
)
TENSOR_SUFFIXES = tuple(f".{name}" for name in ("scale", "zero", *SETTINGS))


def tensors_of(name: str, matrix: IntegerMatrix) -> dict[str, Tensor]:
    """Return the tensors of a quantized layer `name`. ModelError for bits or groups the format does not support."""
    grid, (rows, columns) = matrix.grid, matrix.codes.shape
    packing = PACKINGS.get(grid.bits)
    if packing is None or grid.inputs or grid.group < 0:
        raise ModelError(
            f"{name}: the format hqq has 2, 3, 4 or 8 bits and scales per group or row; use compressed-tensors"
        )
    size = grid.get_group_size(columns)
    codes = (matrix.codes.int() - grid.low).view(-1, size)
    stored = getattr(torch, grid.stored)
    settings: dict[str, bool | int | str] = {
        "nbits": grid.bits,
        "group_size": size,
        "axis": 1,
        "packing": packing,
        "unpack_view_dtype": "torch.int32" if grid.bits == 3 else "torch.uint8",
        "view_as_float": False,
        "compute_dtype": f"torch.{grid.stored}",
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
        "quant_scale": False,
        "quant_zero": False,
    }
    return {
        f"{name}.W_q": _pack(name, codes, packing),
        f"{name}.scale": matrix.scales.scale.reshape(-1, 1).to(stored),
        f"{name}.zero": (matrix.scales.zero.reshape(-1, 1) - grid.low).to(stored),
        f"{name}.shape": torch.tensor([rows, columns]),
        **{f"{name}.{key}": _encode_setting(value) for key, value in settings.items()},
    }


def _encode_setting(value: bool | int | str) -> Tensor:
    """Encode a setting as a tensor, as hqq does."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    return (
        torch.tensor(value, dtype=torch.int32)
        if isinstance(value, int)
        else torch.tensor([ord(one) for one in value], dtype=torch.uint8)
    )


def _pack(name: str, codes: Tensor, packing: str) -> Tensor:
    shifts = SHIFTS[packing]
    if packing == "3bit_32":
        codes = F.pad(codes, (0, 0, 0, -len(codes) % len(shifts)))
    if len(codes) % len(shifts):
        raise ModelError(
            f"{name}: its {len(codes)} groups do not fill bytes of {len(shifts)}, which the format hqq requires; use"
            " compressed-tensors, or ignore the layer"
        )
    words = torch.zeros(len(codes) // len(shifts), codes.shape[1], dtype=torch.int32)
    for part, shift in zip(codes.chunk(len(shifts)), shifts, strict=True):
        words |= part << shift
    return words if packing == "3bit_32" else words.to(torch.uint8)


def config_of(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """Build `quantization_config`; `ignored`: layers that are not quantized."""
    if len(set(grids.values())) > 1:
        raise ModelError("the format hqq has one bit width and one group size for all layers; use compressed-tensors")
    grid = next(iter(grids.values()))
    params = {
        "nbits": grid.bits,
        "channel_wise": True,
        "group_size": grid.group or None,
        "optimize": True,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    }
    return {
        "quant_method": METHOD,
        "quant_config": {
            "weight_quant_params": params,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": list(ignored),
    }


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
    """Yield (name, tensor or quantized matrix) of a directory's weights. ModelError for tensors that do not match."""
    params = (config.get("quant_config") or {}).get("weight_quant_params") or {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == "W_q":
            yield f"{layer}.weight", _read_matrix(tensors, layer, params)
        elif not (name.endswith(TENSOR_SUFFIXES) and f"{layer}.W_q" in tensors):
            yield name, tensors[name]


def _read_matrix(tensors: Mapping[str, Tensor], layer: str, params: Mapping[str, Any]) -> IntegerMatrix:
    """Read the quantized matrix of a layer."""
    try:
        bits = int(tensors[f"{layer}.nbits"]) if f"{layer}.nbits" in tensors else int(params["nbits"])
        axis = int(tensors[f"{layer}.axis"]) if f"{layer}.axis" in tensors else int(params.get("axis", 1))
        if axis != 1 or bits not in PACKINGS or f"{layer}.zero_scale" in tensors:
            raise ModelError(
                f"{layer}: only hqq layers of 2, 3, 4 or 8 bits with groups along rows (axis 1) and unquantized scales"
                f" are supported, not {bits} bits, axis {axis}"
            )
        shifts, mask = SHIFTS[PACKINGS[bits]], (1 << bits) - 1
        rows, columns = (int(n) for n in tensors[f"{layer}.shape"])
        scale, zero = (tensors[f"{layer}.{part}"].float().view(rows, -1) for part in ("scale", "zero"))
        words = tensors[f"{layer}.W_q"].int()
        groups = scale.shape[1]
        if len(words) != -(-rows * groups // len(shifts)) or not (scale.isfinite().all() and zero.isfinite().all()):
            raise ValueError(
                f"codes {tuple(words.shape)}, scales {tuple(scale.shape)}, or scales that are NaN or infinite"
            )
        codes = torch.cat([words >> shift & mask for shift in shifts])[: rows * groups].reshape(rows, columns)
        if columns % groups or zero.shape != scale.shape or words.shape[1] != columns // groups:
            raise ValueError(f"codes {tuple(words.shape)}, scales {tuple(scale.shape)}, shape {rows} x {columns}")
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{layer}: its tensors do not match ({error})") from None
    grid = Grid(bits, 0 if groups == 1 else columns // groups, symmetric=False, real_zero_points=True)
    return IntegerMatrix((codes + grid.low).to(torch.int8), Scales(scale, zero + grid.low), grid)


def get_input_quantization(config: Mapping[str, Any], name: str) -> None:
    """Return None: inputs are not quantized."""
