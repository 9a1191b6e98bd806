"""Third-party GPU kernels: Liger's RMSNorm and SwiGLU, bitsandbytes' 4-bit dequantization.

Used where they are installed and tensors are on CUDA. They compute the same as the functions they replace
(`tests/model/test_kernels.py`); `LLMWORKS_KERNELS=0` disables them.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def import_kernels(module: str) -> Any:
    """Import a kernel module; None if it is not installed or there is no GPU.

    Importing Liger without a GPU breaks models in the whole process, so it is not tried.
    """
    if not torch.cuda.is_available() or os.environ.get("LLMWORKS_KERNELS") == "0":
        return None
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):  # incompatible triton or CUDA library
        return None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, unit_offset: bool) -> Tensor | None:
    """Apply Liger's RMSNorm to [..., hidden_size], saving one number per token for backward; None if unavailable."""
    liger = import_kernels("liger_kernel.ops.rms_norm") if x.is_cuda else None
    if liger is None or not isinstance(weight, Tensor) or type(weight.data) is not Tensor:  # sharded weights (DTensor)
        return None
    y: Tensor = liger.LigerRMSNormFunction.apply(
        x, weight, epsilon, 1.0 if unit_offset else 0.0, "gemma" if unit_offset else "llama", False
    )
    return y


def silu_gate(gate: Tensor, up: Tensor) -> Tensor | None:
    """Compute Liger's silu(gate) * up; None if unavailable."""
    liger = import_kernels("liger_kernel.ops.swiglu") if gate.is_cuda else None
    if liger is None or type(gate) is not Tensor:
        return None
    y: Tensor = liger.LigerSiLUMulFunction.apply(gate, up)
    return y


def dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: float,
    shape: tuple[int, ...],
    tables: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Dequantize NF4 to fp32 [shape] with bitsandbytes; None if unavailable.

    `tables`: the 256-entry map of 8-bit scales, and the 16 levels.
    """
    kernels = import_kernels("bitsandbytes.functional") if codes.is_cuda else None
    return (
        None
        if kernels is None
        else dequantize_nf4_with(kernels, codes, scales, nested_scales, nested_offset, shape, tables)
    )


def dequantize_nf4_with(
    kernels: Any,
    codes: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: float,
    shape: tuple[int, ...],
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """Dequantize NF4 with a given `bitsandbytes.functional`, on any device."""
    levels = tables[1].to(codes.device)
    common = {"shape": torch.Size(shape), "code": levels, "blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}
    if nested_scales is None:
        state = kernels.QuantState(absmax=scales, **common)
    else:
        inner = kernels.QuantState(
            absmax=nested_scales, blocksize=256, code=tables[0].to(codes.device), dtype=torch.float32
        )
        state = kernels.QuantState(
            absmax=scales, offset=torch.tensor(nested_offset, device=codes.device), state2=inner, **common
        )
    y: Tensor = kernels.dequantize_4bit(codes.view(-1, 1), state)
    return y.view(shape)
