"""Whole numbers in a Hugging Face directory as GPTQ and AWQ checkpoints have them, which transformers, vLLM, SGLang and
others read.

Knows no method.

GPTQ (AutoGPTQ, gptqmodel): `qweight` [in * bits / 32, out], `qzeros` [groups, out * bits / 32], `scales` [groups, out],
`g_idx` [in]; format 1 keeps a zero point less one, format 2 as it is.
AWQ (AutoAWQ, "gemm"): `qweight` [in, out / 8], `qzeros` [groups, out / 8], eight columns to a word in the order 0 2 4 6
1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import Grid, Scales, Whole, packed, unpacked

PARTS = (".qzeros", ".scales", ".g_idx")
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # of the columns in a word of AWQ's


def check(name: str, matrix: Whole) -> None:
    """Whether the layouts have a place for it. ModelError where not."""
    rows, columns = matrix.codes.shape
    if matrix.grid.inputs or matrix.grid.group < 0:
        raise ModelError(
            f"{name}: the forms gptq and awq have no place for rounded inputs, or for one scale of a whole matrix"
        )
    if rows * matrix.grid.bits % 32 or columns * matrix.grid.bits % 32:
        raise ModelError(
            f"{name}: {rows} x {columns} weights in {matrix.grid.bits} bits do not fill words of 32 bits, as the forms"
            " gptq and awq have them; take compressed-tensors, or skip the layer"
        )


def scales_of(matrix: Whole) -> Tensor:
    """[groups, out]."""
    return matrix.scales.scale.to(getattr(torch, matrix.grid.stored)).T.contiguous()


class Gptq:
    """The form of GPTQ's checkpoints."""

    @staticmethod
    def tensors_of(name: str, matrix: Whole) -> dict[str, Tensor]:
        """The tensors of a layer `name`."""
        check(name, matrix)
        grid = matrix.grid
        zero = matrix.scales.zero.to(torch.int8).T - (
            1 if grid.symmetric else 0
        )  # format 1 where there are none, format 2 else
        groups = torch.arange(matrix.codes.shape[1], dtype=torch.int32) // grid.size(matrix.codes.shape[1])
        return {
            f"{name}.qweight": packed(matrix.codes, grid.bits).T.contiguous(),
            f"{name}.qzeros": packed(zero.contiguous(), grid.bits),
            f"{name}.scales": scales_of(matrix),
            f"{name}.g_idx": groups,
        }

    @staticmethod
    def config_of(grids: Mapping[str, Grid], left: Sequence[str]) -> dict[str, Any]:
        """`quantization_config`; layers that were left are named in `dynamic`, as gptqmodel and vLLM have it."""
        grid = _only(grids)
        names = [name for name in left if name != "lm_head"]
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
            **_dynamic(names),
        }

    @staticmethod
    def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Whole | Tensor]]:
        """(name, what it is) of all weights of a directory; plain ones, fp32, where columns are out of order (`g_idx`).

        ModelError for a layer whose tensors do not belong together.
        """
        bits, second = int(config["bits"]), config.get("checkpoint_format", config.get("format", "gptq")) == "gptq_v2"
        if bits not in (2, 3, 4, 8):
            raise ModelError(f"config.json: a GPTQ checkpoint of {bits} bits cannot be read here")

        def matrix(layer: str) -> Whole | Tensor:
            words, scale = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
            columns, rows = len(words) * 32 // bits, words.shape[1]
            codes = unpacked(words.T.contiguous(), bits, columns)
            stored = unpacked(tensors[f"{layer}.qzeros"], bits, rows)
            zero = stored.float() if second else _more(stored, bits)
            even = torch.arange(columns) // (columns // len(scale))
            if config.get("desc_act") and len(scale) > 1 and f"{layer}.g_idx" not in tensors:
                raise ValueError("columns by their inputs (desc_act), and no g_idx that says which group each is in")
            groups = tensors[f"{layer}.g_idx"].long() if f"{layer}.g_idx" in tensors else even
            if len(groups) != columns or int(groups.min()) < 0:
                raise ValueError(f"g_idx of {len(groups)} columns, the least {int(groups.min())}")
            if torch.equal(groups, even):
                return _whole(codes, scale.T, zero.T, bits)
            return (codes.float() - zero.T[:, groups]) * scale.T[:, groups]

        return _weights(tensors, matrix)

    @staticmethod
    def reading_of(config: Mapping[str, Any], name: str) -> None:
        """Inputs are not rounded."""


class Awq:
    """The form of AWQ's checkpoints, of 4 bits."""

    @staticmethod
    def tensors_of(name: str, matrix: Whole) -> dict[str, Tensor]:
        """The tensors of a layer `name`."""
        check(name, matrix)
        if matrix.grid.bits != 4:
            raise ModelError(f"the form awq has 4 bits, not {matrix.grid.bits}; take gptq or compressed-tensors")
        return {
            f"{name}.qweight": packed(_turned(matrix.codes.T), 4),
            f"{name}.qzeros": packed(_turned(matrix.scales.zero.to(torch.int8).T), 4),
            f"{name}.scales": scales_of(matrix),
        }

    @staticmethod
    def config_of(grids: Mapping[str, Grid], left: Sequence[str]) -> dict[str, Any]:
        """`quantization_config`; `left`: layers that are as they were."""
        grid = _only(grids)
        names = [name for name in left if name != "lm_head"]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": grid.group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": names or None,
            **_dynamic(names),
        }

    @staticmethod
    def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Whole | Tensor]]:
        """(name, what it is) of all weights of a directory.

        ModelError for a layer whose tensors do not belong together.
        """
        if int(config.get("bits", config.get("w_bit", 4))) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
            raise ModelError(
                "config.json: of AWQ checkpoints those of 4 bits in the version gemm can be read here, not"
                f" {config.get('bits')} bits, {config.get('version')}"
            )

        def matrix(layer: str) -> Whole:
            words, scale = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
            rows = words.shape[1] * 8
            codes, zero = (_back(unpacked(given, 4, rows)).T for given in (words, tensors[f"{layer}.qzeros"]))
            return _whole(codes, scale.T, zero.float(), 4)

        return _weights(tensors, matrix)

    @staticmethod
    def reading_of(config: Mapping[str, Any], name: str) -> None:
        """Inputs are not rounded."""


def _dynamic(names: Sequence[str]) -> dict[str, Any]:
    """Layers that were left, as gptqmodel and vLLM have it."""
    return {"dynamic": {"-:^" + name.replace(".", "\\.") + "$": {} for name in names}} if names else {}


def _only(grids: Mapping[str, Grid]) -> Grid:
    """The grid that all layers have. ModelError where they differ."""
    kinds = set(grids.values())
    if len(kinds) > 1:
        raise ModelError(
            "the forms gptq and awq have one number of bits and one size of groups for all layers; take"
            " compressed-tensors"
        )
    return kinds.pop()


def _whole(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Whole:
    """A matrix of codes [out, in] whose groups stand in order. ValueError where they do not divide a row."""
    (rows, columns), groups = codes.shape, scale.shape[1]
    if columns % groups or scale.shape != (rows, groups) or zero.shape != scale.shape:
        raise ValueError(f"codes {tuple(codes.shape)}, scales {tuple(scale.shape)}, zero points {tuple(zero.shape)}")
    return Whole(
        codes.contiguous(),
        Scales(scale.contiguous(), zero.contiguous()),
        Grid(bits, 0 if groups == 1 else columns // groups, symmetric=False),
    )


def _weights(
    tensors: Mapping[str, Tensor], matrix: Callable[[str], Whole | Tensor]
) -> Iterator[tuple[str, Whole | Tensor]]:
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            try:
                found = matrix(layer)
            except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
                raise ModelError(f"{layer}: its tensors do not belong together ({error})") from None
            yield f"{layer}.weight", found
        elif not (name.endswith(PARTS) and f"{layer}.qweight" in tensors):
            tensor = tensors[name]
            if not (
                part == "bias" and f"{layer}.qweight" in tensors and not tensor.any()
            ):  # AutoGPTQ writes biases of zeros where there are none
                yield name, tensor


def _more(stored: Tensor, bits: int) -> Tensor:
    """Zero points that were kept less one: the largest means 0 again."""
    low = -(1 << (bits - 1))
    return ((stored.to(torch.int16) + 1 - low) % (1 << bits) + low).float()


def _turned(codes: Tensor) -> Tensor:
    """Columns [any, out] in the order in which AWQ packs them."""
    return codes.reshape(len(codes), -1, 8)[:, :, ORDER].reshape(codes.shape).contiguous()


def _back(codes: Tensor) -> Tensor:
    made = torch.empty_like(codes).view(len(codes), -1, 8)
    made[:, :, ORDER] = codes.reshape(len(codes), -1, 8)
    return made.view(codes.shape)
