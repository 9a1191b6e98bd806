"""Read and write GPTQ and AWQ checkpoints, which transformers, vLLM, SGLang and others load.

GPTQ (AutoGPTQ, gptqmodel): `qweight` [in * bits / 32, out], `qzeros` [groups, out * bits / 32], `scales` [groups, out],
`g_idx` [in]; format v1 stores the zero point minus one, v2 the zero point itself.
AWQ (AutoAWQ, "gemm"): `qweight` [in, out / 8], `qzeros` [groups, out / 8], eight columns per int32 in the order 0 2 4 6
1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales, pack_integers, unpack_integers

TENSOR_SUFFIXES = (".qzeros", ".scales", ".g_idx")
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # column order within AWQ's int32 words


def check_matrix(name: str, matrix: IntegerMatrix) -> None:
    """Check that the formats can hold the matrix. ModelError where not."""
    rows, columns = matrix.codes.shape
    if matrix.grid.inputs or matrix.grid.group < 0:
        raise ModelError(f"{name}: the formats gptq and awq do not support quantized inputs or per-tensor scales")
    if rows * matrix.grid.bits % 32 or columns * matrix.grid.bits % 32:
        raise ModelError(
            f"{name}: {rows} x {columns} weights of {matrix.grid.bits} bits do not fill 32-bit words, which the"
            " formats gptq and awq require; use compressed-tensors, or ignore the layer"
        )


def get_scales(matrix: IntegerMatrix) -> Tensor:
    """Return the scales as [groups, out]."""
    return matrix.scales.scale.to(getattr(torch, matrix.grid.stored)).T.contiguous()


class GptqFormat:
    """GPTQ checkpoint format."""

    @staticmethod
    def tensors_of(name: str, matrix: IntegerMatrix) -> dict[str, Tensor]:
        """Return the tensors of a quantized layer `name`."""
        check_matrix(name, matrix)
        grid = matrix.grid
        zero = matrix.scales.zero.to(torch.int8).T - (1 if grid.symmetric else 0)  # v1 for symmetric grids, else v2
        groups = torch.arange(matrix.codes.shape[1], dtype=torch.int32) // grid.get_group_size(matrix.codes.shape[1])
        return {
            f"{name}.qweight": pack_integers(matrix.codes, grid.bits).T.contiguous(),
            f"{name}.qzeros": pack_integers(zero.contiguous(), grid.bits),
            f"{name}.scales": get_scales(matrix),
            f"{name}.g_idx": groups,
        }

    @staticmethod
    def config_of(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
        """Build `quantization_config`; layers that are not quantized go into `dynamic`, as in gptqmodel and vLLM."""
        grid = _get_common_grid(grids)
        names = [name for name in ignored if name != "lm_head"]
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group or -1,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
            "true_sequential": True,
            "pack_dtype": "int32",
            "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
            **_build_dynamic(names),
        }

    @staticmethod
    def weights(
        tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
        """Yield (name, tensor or quantized matrix) of a directory's weights.

        Layers with act-order columns (`g_idx`) are dequantized to fp32. ModelError for tensors that do not match.
        """
        bits, second = int(config["bits"]), config.get("checkpoint_format", config.get("format", "gptq")) == "gptq_v2"
        if bits not in (2, 3, 4, 8):
            raise ModelError(f"config.json: a GPTQ checkpoint of {bits} bits is not supported")

        def matrix(layer: str) -> IntegerMatrix | Tensor:
            words, scale = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
            columns, rows = len(words) * 32 // bits, words.shape[1]
            codes = unpack_integers(words.T.contiguous(), bits, columns)
            stored = unpack_integers(tensors[f"{layer}.qzeros"], bits, rows)
            zero = stored.float() if second else _restore_v1_zero_points(stored, bits)
            even = torch.arange(columns) // (columns // len(scale))
            if config.get("desc_act") and len(scale) > 1 and f"{layer}.g_idx" not in tensors:
                raise ValueError("act-order (desc_act) without g_idx")
            groups = tensors[f"{layer}.g_idx"].long() if f"{layer}.g_idx" in tensors else even
            if len(groups) != columns or int(groups.min()) < 0:
                raise ValueError(f"g_idx of {len(groups)} columns, minimum {int(groups.min())}")
            if torch.equal(groups, even):
                return _build_matrix(codes, scale.T, zero.T, bits)
            return (codes.float() - zero.T[:, groups]) * scale.T[:, groups]

        return _iter_weights(tensors, matrix)

    @staticmethod
    def get_input_quantization(config: Mapping[str, Any], name: str) -> None:
        """Return None: inputs are not quantized."""


class AwqFormat:
    """AWQ checkpoint format, 4 bits."""

    @staticmethod
    def tensors_of(name: str, matrix: IntegerMatrix) -> dict[str, Tensor]:
        """Return the tensors of a quantized layer `name`."""
        check_matrix(name, matrix)
        if matrix.grid.bits != 4:
            raise ModelError(f"the format awq has 4 bits, not {matrix.grid.bits}; use gptq or compressed-tensors")
        return {
            f"{name}.qweight": pack_integers(_to_awq_order(matrix.codes.T), 4),
            f"{name}.qzeros": pack_integers(_to_awq_order(matrix.scales.zero.to(torch.int8).T), 4),
            f"{name}.scales": get_scales(matrix),
        }

    @staticmethod
    def config_of(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
        """Build `quantization_config`; `ignored`: layers that are not quantized."""
        grid = _get_common_grid(grids)
        names = [name for name in ignored if name != "lm_head"]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": grid.group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": names or None,
            **_build_dynamic(names),
        }

    @staticmethod
    def weights(
        tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
        """Yield (name, tensor or quantized matrix) of a directory's weights.

        ModelError for tensors that do not match.
        """
        if int(config.get("bits", config.get("w_bit", 4))) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
            raise ModelError(
                "config.json: only AWQ checkpoints of 4 bits, version gemm, are supported, not"
                f" {config.get('bits')} bits, {config.get('version')}"
            )

        def matrix(layer: str) -> IntegerMatrix:
            words, scale = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
            rows = words.shape[1] * 8
            codes, zero = (
                _from_awq_order(unpack_integers(given, 4, rows)).T for given in (words, tensors[f"{layer}.qzeros"])
            )
            return _build_matrix(codes, scale.T, zero.float(), 4)

        return _iter_weights(tensors, matrix)

    @staticmethod
    def get_input_quantization(config: Mapping[str, Any], name: str) -> None:
        """Return None: inputs are not quantized."""


def _build_dynamic(names: Sequence[str]) -> dict[str, Any]:
    """Return the `dynamic` entry of layers that are not quantized, as in gptqmodel and vLLM."""
    return {"dynamic": {"-:^" + name.replace(".", "\\.") + "$": {} for name in names}} if names else {}


def _get_common_grid(grids: Mapping[str, Grid]) -> Grid:
    """Return the grid shared by all layers. ModelError where they differ."""
    kinds = set(grids.values())
    if len(kinds) > 1:
        raise ModelError(
            "the formats gptq and awq have one bit width and one group size for all layers; use compressed-tensors"
        )
    return kinds.pop()


def _build_matrix(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> IntegerMatrix:
    """Build a matrix from codes [out, in] with groups in order. ValueError where groups do not divide a row."""
    (rows, columns), groups = codes.shape, scale.shape[1]
    if columns % groups or scale.shape != (rows, groups) or zero.shape != scale.shape:
        raise ValueError(f"codes {tuple(codes.shape)}, scales {tuple(scale.shape)}, zero points {tuple(zero.shape)}")
    return IntegerMatrix(
        codes.contiguous(),
        Scales(scale.contiguous(), zero.contiguous()),
        Grid(bits, 0 if groups == 1 else columns // groups, symmetric=False),
    )


def _iter_weights(
    tensors: Mapping[str, Tensor], matrix: Callable[[str], IntegerMatrix | Tensor]
) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            try:
                found = matrix(layer)
            except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
                raise ModelError(f"{layer}: its tensors do not match ({error})") from None
            yield f"{layer}.weight", found
        elif not (name.endswith(TENSOR_SUFFIXES) and f"{layer}.qweight" in tensors):
            tensor = tensors[name]
            if not (
                part == "bias" and f"{layer}.qweight" in tensors and not tensor.any()
            ):  # AutoGPTQ writes zero biases for layers without bias
                yield name, tensor


def _restore_v1_zero_points(stored: Tensor, bits: int) -> Tensor:
    """Undo the minus one of v1 zero points; the largest wraps around to 0."""
    low = -(1 << (bits - 1))
    return ((stored.to(torch.int16) + 1 - low) % (1 << bits) + low).float()


def _to_awq_order(codes: Tensor) -> Tensor:
    """Reorder columns [any, out] to AWQ's packing order."""
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape).contiguous()


def _from_awq_order(codes: Tensor) -> Tensor:
    made = torch.empty_like(codes).view(len(codes), -1, 8)
    made[:, :, AWQ_ORDER] = codes.reshape(len(codes), -1, 8)
    return made.view(codes.shape)
