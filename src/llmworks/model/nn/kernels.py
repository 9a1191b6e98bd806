"""Kernels of others for a GPU: Liger's norm and gate, bitsandbytes' 4-bit unpacking.

Taken where they are installed and the tensors lie on CUDA; a CPU never touches them.

They compute what the functions beside them compute (`tests/model/test_kernels.py`); `LLMWORKS_KERNELS=0` leaves them
out.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def found(module: str) -> Any:
    """A module of kernels; None where it is not installed, or there is no GPU.

    Importing Liger without one breaks models of the whole process, so it is not tried.
    """
    if not torch.cuda.is_available() or os.environ.get("LLMWORKS_KERNELS") == "0":
        return None
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):  # triton, or a library of CUDA, that does not fit
        return None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, from_zero: bool) -> Tensor | None:
    """Liger's RMSNorm of [..., width], which keeps one number a token for the way back; None where it cannot be
    taken.
    """
    liger = found("liger_kernel.ops.rms_norm") if x.is_cuda else None
    if (
        liger is None or not isinstance(weight, Tensor) or type(weight.data) is not Tensor
    ):  # sharded weights are DTensors
        return None
    y: Tensor = liger.LigerRMSNormFunction.apply(
        x, weight, epsilon, 1.0 if from_zero else 0.0, "gemma" if from_zero else "llama", False
    )
    return y


def silu_gate(gate: Tensor, up: Tensor) -> Tensor | None:
    """Liger's silu(gate) * up; None where it cannot be taken."""
    liger = found("liger_kernel.ops.swiglu") if gate.is_cuda else None
    if liger is None or type(gate) is not Tensor:
        return None
    y: Tensor = liger.LigerSiLUMulFunction.apply(gate, up)
    return y


def unpack_nf4(
    codes: Tensor,
    scales: Tensor,
    second: Tensor | None,
    mean: float,
    shape: tuple[int, ...],
    tables: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Bitsandbytes' unpacking of NF4 to fp32 [shape]; None where it cannot be taken.

    `tables`: the 256 numbers of scales in 8 bits, and the 16 levels.
    """
    kernels = found("bitsandbytes.functional") if codes.is_cuda else None
    return None if kernels is None else unpack_with(kernels, codes, scales, second, mean, shape, tables)


def unpack_with(
    kernels: Any,
    codes: Tensor,
    scales: Tensor,
    second: Tensor | None,
    mean: float,
    shape: tuple[int, ...],
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """The same by a given `bitsandbytes.functional`, on any device."""
    levels = tables[1].to(codes.device)
    common = {"shape": torch.Size(shape), "code": levels, "blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}
    if second is None:
        state = kernels.QuantState(absmax=scales, **common)
    else:
        inner = kernels.QuantState(absmax=second, blocksize=256, code=tables[0].to(codes.device), dtype=torch.float32)
        state = kernels.QuantState(
            absmax=scales, offset=torch.tensor(mean, device=codes.device), state2=inner, **common
        )
    y: Tensor = kernels.dequantize_4bit(codes.view(-1, 1), state)
    return y.view(shape)
