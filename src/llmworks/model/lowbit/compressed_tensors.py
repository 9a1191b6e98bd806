"""Read and write integer-quantized weights as compressed-tensors, which transformers and vLLM load.

Formats: `pack-quantized` (bit-packed in int32) and `int-quantized` (int8, with quantized inputs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.activations import InputQuantization
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales, pack_integers, unpack_integers

METHOD = "compressed-tensors"
TENSOR_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")


def tensors_of(name: str, matrix: IntegerMatrix) -> dict[str, Tensor]:
    """Return the tensors of a quantized layer `name`: int8 where inputs are quantized too, else packed."""
    grid, (rows, columns) = matrix.grid, matrix.codes.shape
    stored = getattr(torch, grid.stored)
    scale = matrix.scales.scale.to(stored).contiguous()
    if scale.shape[0] != rows:
        scale = scale.expand(rows, 1).contiguous()
    if _is_int8(grid):
        return {f"{name}.weight": matrix.codes.contiguous(), f"{name}.weight_scale": scale}
    tensors = {
        f"{name}.weight_packed": pack_integers(matrix.codes, grid.bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    if not grid.symmetric:
        zero = matrix.scales.zero.expand(rows, -1).to(torch.int8)
        tensors[f"{name}.weight_zero_point"] = pack_integers(
            zero.T.contiguous(), grid.bits
        ).T.contiguous()  # packed along rows, not groups
    return tensors


def _is_int8(grid: Grid) -> bool:
    """Return whether codes are stored as int8, unpacked."""
    return grid.inputs is not None and grid.bits == 8


def config_of(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """Build `quantization_config` from layers by name, and `ignored`, the layers that are not quantized.

    Layers with the same grid share a config group.
    """
    kinds: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        kinds.setdefault(grid, []).append(name)
    groups = {}
    for number, (grid, names) in enumerate(kinds.items()):
        strategy = "group" if grid.group > 0 else "channel"
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": strategy,
            "group_size": grid.group if grid.group > 0 else None,
            "dynamic": False,
            "observer": "minmax",
            "actorder": None,
            "block_structure": None,
        }
        inputs = (
            {
                "num_bits": grid.inputs.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "group_size": None,
                "dynamic": True,
                "observer": None,
                "actorder": None,
                "block_structure": None,
            }
            if grid.inputs
            else None
        )
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": "int-quantized" if _is_int8(grid) else "pack-quantized",
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Return whether a layer is among targets: by its name, or by a pattern ("re:...") that matches its beginning
    (compressed-tensors' match_name).
    """
    return any(
        re.match(one.removeprefix("re:"), name) is not None if one.startswith("re:") else one == name for one in targets
    )


def get_config_group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a layer's group in `quantization_config`. ModelError where it has none that is supported."""
    groups = list(config.get("config_groups", {}).values())
    found = next((group for group in groups if is_target(name, group["targets"])), None) or next(
        (group for group in groups if "Linear" in group["targets"]), None
    )
    if found is None or found["weights"].get("type", "int") != "int":
        raise ModelError(f"config.json: quantization_config has no integer weights for {name}")
    inputs = found.get("input_activations")
    if inputs and not (
        inputs.get("type", "int") == "int"
        and inputs.get("strategy") == "token"
        and inputs.get("dynamic")
        and inputs.get("symmetric", True)
    ):
        raise ModelError(
            f"config.json: quantization_config has input_activations for {name} that are not supported; supported:"
            " symmetric integers, per token, dynamic"
        )
    group: dict[str, Any] = found
    return group


def get_input_quantization(config: Mapping[str, Any], name: str) -> InputQuantization | None:
    """Return how a layer's inputs are quantized; None: they are not."""
    if is_target(name, config.get("ignore") or ()):
        return None
    inputs = get_config_group(config, name).get("input_activations")
    return InputQuantization(int(inputs["num_bits"])) if inputs else None


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
    """Yield (name, tensor or quantized matrix) of a directory's weights. ModelError for tensors that do not match."""
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and f"{layer}.weight_scale" in tensors):
            yield f"{layer}.weight", read_matrix(tensors, layer, config)
        elif not name.endswith(TENSOR_SUFFIXES):
            yield name, tensors[name]


def read_matrix(tensors: Mapping[str, Tensor], layer: str, config: Mapping[str, Any]) -> IntegerMatrix:
    """Read the quantized matrix of a layer."""
    weight_args = get_config_group(config, layer)["weights"]
    bits, symmetric = int(weight_args["num_bits"]), bool(weight_args.get("symmetric", True))
    try:
        scale = tensors[f"{layer}.weight_scale"].float()
        if f"{layer}.weight_packed" in tensors:
            rows, columns = (int(n) for n in tensors[f"{layer}.weight_shape"])
            codes = unpack_integers(tensors[f"{layer}.weight_packed"], bits, columns)
        else:
            codes = tensors[f"{layer}.weight"]
            rows, columns = codes.shape
        groups = scale.shape[1] if scale.ndim == 2 else 1
        scale = scale.reshape(-1, groups)
        if f"{layer}.weight_g_idx" in tensors and not torch.equal(
            tensors[f"{layer}.weight_g_idx"].long(), torch.arange(columns) // (columns // groups)
        ):
            raise ModelError(f"{layer}: its groups are out of order (g_idx, act-order), which is not supported")
        zero = torch.zeros_like(scale)
        if not scale.isfinite().all() or not tensors[f"{layer}.weight_scale"].is_floating_point():
            raise ValueError("scales are not finite floats")
        if not symmetric:
            zero_point = tensors[f"{layer}.weight_zero_point"]
            zero = (
                unpack_integers(zero_point.T.contiguous(), bits, rows).T
                if zero_point.dtype == torch.int32
                else zero_point.reshape(-1, groups)
            ).float()
        if (
            columns % groups
            or scale.shape[0] not in (1, rows)
            or zero.shape != scale.shape
            or codes.shape != (rows, columns)
        ):
            raise ValueError(f"codes {tuple(codes.shape)}, scales {tuple(scale.shape)}")
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{layer}: its tensors do not match ({error})") from None
    return IntegerMatrix(
        codes,
        Scales(scale, zero),
        Grid(bits, (-1 if len(scale) == 1 and rows > 1 else 0) if groups == 1 else columns // groups, symmetric),
    )
