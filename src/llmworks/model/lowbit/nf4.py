"""NF4 quantization: 4-bit weights in blocks of 64 with an absmax scale; levels are 16 quantiles of a normal
distribution. Also FP4: floats of two exponent bits and one mantissa bit.

Dettmers et al. 2023, QLoRA (arXiv:2305.14314), sections 2 and 3; the levels, and those of double quantization (block
scales in 8 bits, Dettmers et al. 2022, arXiv:2110.02861), are those of bitsandbytes. Pure tensor functions, and the
frozen linear layer that uses them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmworks.model.nn import kernels

BLOCK_SIZE, SCALE_BLOCK_SIZE = 64, 256  # block size of weights; block size of scales (double quantization)
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_VALUES = tuple(
    value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)  # value of a code's lower three bits; the upper bit is the sign
CODEBOOKS = {"nf4": NF4_LEVELS, "fp4": (*FP4_VALUES, *(-value for value in FP4_VALUES))}  # values of the 16 codes


@functools.lru_cache(maxsize=2)
def get_dynamic_map() -> Tensor:
    """Return bitsandbytes' dynamic map: 256 values from -1 to 1, denser near zero (arXiv:2110.02861, figure 2).

    Of 8 bits one is the sign, some count a power of ten, the rest divide it linearly.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


@functools.lru_cache(maxsize=4)
def _get_levels(device: torch.device, quant_type: str = "nf4") -> tuple[Tensor, Tensor, Tensor]:
    """Return (levels by code, boundaries between the sorted levels, codes in sorted order)."""
    levels = torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32, device=device)
    order = torch.argsort(levels, stable=True)
    if quant_type == "fp4":
        order = order[order != 8]  # -0 is not used
    sorted_levels = levels[order]
    return levels, (sorted_levels[1:] + sorted_levels[:-1]) / 2, order.to(torch.uint8)


@dataclass(frozen=True)
class Packed4bit:
    """A matrix quantized to 4 bits.

    codes: two per byte, the first in its upper half; scales: per block; with `nested_scales` (double quantization) the
    scales are 8-bit codes of scales minus their `nested_offset`.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    nested_scales: Tensor | None = None
    nested_offset: float = 0.0
    quant_type: str = "nf4"

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        parts = (self.codes, self.scales, *(() if self.nested_scales is None else (self.nested_scales,)))
        return float(8 * sum(part.numel() * part.element_size() for part in parts) / math.prod(self.shape))


def pack_4bit(weight: Tensor, *, double_quant: bool = True, quant_type: str = "nf4") -> Packed4bit:
    """Quantize a matrix to the nearest levels, block by block in row-major order. `quant_type`: nf4 or fp4."""
    flat = weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    normed = blocks * (1.0 / torch.where(scales > 0, scales, torch.ones_like(scales)))[:, None]
    _, borders, order = _get_levels(weight.device, quant_type)
    codes = order[torch.bucketize(normed, borders)].view(-1)[: len(flat) + len(flat) % 2]
    packed = codes[0::2] << 4 | codes[1::2]
    if not double_quant:
        return Packed4bit(packed, scales, tuple(weight.shape), quant_type=quant_type)
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % SCALE_BLOCK_SIZE)).view(-1, SCALE_BLOCK_SIZE)
    second = groups.abs().amax(1)
    table = get_dynamic_map().to(weight.device)
    relative = (groups * (1.0 / torch.where(second > 0, second, torch.ones_like(second)))[:, None]).view(-1)[
        : len(scales)
    ]
    return Packed4bit(
        packed,
        torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8),
        tuple(weight.shape),
        second,
        float(mean),
        quant_type,
    )


def unpack_4bit(packed: Packed4bit, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize to the matrix."""
    scales = packed.scales
    if packed.nested_scales is not None:
        scales = (
            get_dynamic_map().to(scales.device)[scales.int()]
            * packed.nested_scales.repeat_interleave(SCALE_BLOCK_SIZE)[: len(scales)]
            + packed.nested_offset
        )
    values = _get_byte_levels(packed.codes.device, packed.quant_type)[packed.codes.int()].view(-1)
    padded = F.pad(values, (0, -len(values) % BLOCK_SIZE)).view(-1, BLOCK_SIZE) * scales[:, None]
    return padded.view(-1)[: math.prod(packed.shape)].view(packed.shape).to(dtype)


@functools.lru_cache(maxsize=4)
def _get_byte_levels(device: torch.device, quant_type: str) -> Tensor:
    """Return both levels of every byte [256, 2], to look up two weights at once."""
    levels = _get_levels(device, quant_type)[0]
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1)


class _FrozenLinearFunction(torch.autograd.Function):
    """x W' with a packed W, dequantized again in the backward pass instead of being saved."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        context.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return gradients[0] @ context.layer.dequantize().to(gradients[0].dtype), None


class NF4Linear(nn.Module):
    """Frozen linear layer with a weight in 4 bits."""

    codes: Tensor
    scales: Tensor
    second: Tensor | None

    def __init__(self, base: nn.Linear, *, double_quant: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        packed = pack_4bit(base.weight, double_quant=double_quant)
        self.nested_offset = packed.nested_offset
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("second", packed.nested_scales)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)

    def dequantize(self) -> Tensor:
        """Dequantize the weight to [out, in], fp32."""
        shape = (self.out_features, self.in_features)
        fast = (
            kernels.dequantize_nf4(
                self.codes,
                self.scales,
                self.second,
                self.nested_offset,
                shape,
                (get_dynamic_map(), _get_levels(self.codes.device)[0]),
            )
            if self.codes.is_cuda
            else None
        )
        return (
            unpack_4bit(Packed4bit(self.codes, self.scales, shape, self.second, self.nested_offset))
            if fast is None
            else fast
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute x: [..., in] -> [..., out]."""
        y: Tensor = _FrozenLinearFunction.apply(x, self)  # type: ignore[no-untyped-call]
        return y


def replace_with_nf4(model: nn.Module, names: list[str], *, double_quant: bool = True) -> None:
    """Replace the linear layers of these names by `NF4Linear`, in place."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        base: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, NF4Linear(base, double_quant=double_quant))
