"""Linear layers that compute with 4- or 8-bit weights through torch's CPU kernels: less memory traffic per token.

Few rows go through a kernel; for many, weights are dequantized to bfloat16, whose matrix products are twice as fast as
in fp32. Both use bfloat16 inputs, scales, zero points and outputs, so logits differ from those of the dequantized
weights in the third digit. On CPUs without bfloat16 instructions dequantized weights are faster and are kept. Inference
only.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.model.lowbit.integer import IntegerMatrix

GROUP_SIZES = (256, 128, 64, 32)  # group sizes of the 4-bit kernel
PACKED_ROWS = 64  # rows per block of the kernel's layout


@functools.cache
def is_available() -> bool:
    """Return whether this CPU has bfloat16 instructions and torch packs 4 bits in the layout that `_unpack` reads."""
    if (
        not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        or not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    ):
        return False
    codes = (torch.arange(PACKED_ROWS * 32).view(PACKED_ROWS, 32) * 7 // 3 % 16).int()
    return torch.equal(_unpack(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)), codes.T.byte())


def make_low_bit_layer(matrix: IntegerMatrix) -> LowBitLinear | None:
    """Create the layer of a matrix; None where torch has no kernel for it, or this CPU is faster without."""
    rows, columns = matrix.codes.shape
    if not is_available() or matrix.grid.group < 0:
        return None
    if matrix.grid.bits > 4:
        return (
            Int8Linear(matrix)
            if matrix.scales.scale.shape[1] == 1 and columns % 32 == 0 and not matrix.scales.zero.any()
            else None
        )
    size = columns // matrix.scales.scale.shape[1]
    group = size if size in GROUP_SIZES else next((one for one in GROUP_SIZES if size % one == 0), 0)
    return Int4Linear(matrix, group) if group and rows % PACKED_ROWS == 0 else None


class LowBitLinear(nn.Module):
    """Base class: [..., in] -> [..., out], in the input's number format."""

    bias: Tensor | None
    max_kernel_rows = 0  # rows up to which the kernel is not slower than dequantizing

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = self.out_features, self.in_features = shape
        self.register_buffer("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x: [..., in] -> [..., out]."""
        flat = (
            x.reshape(-1, self.in_features).contiguous().to(torch.bfloat16, copy=True)
        )  # the 8-bit kernel crashes where rows are not aligned to 32 bytes
        y = (self.forward_kernel if len(flat) <= self.max_kernel_rows else self.forward_dense)(flat).to(x.dtype)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], self.out_features)

    def forward_kernel(self, x: Tensor) -> Tensor:
        """Compute [rows, in] -> [rows, out] with a kernel."""
        raise NotImplementedError

    def forward_dense(self, x: Tensor) -> Tensor:
        """Compute [rows, in] -> [rows, out] with dequantized weights."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what torch prints for the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(LowBitLinear):
    """8 bits (also 5 to 7), one scale per row."""

    codes: Tensor
    scale: Tensor
    max_kernel_rows = 8

    def __init__(self, matrix: IntegerMatrix) -> None:
        rows, columns = matrix.codes.shape
        super().__init__((rows, columns))
        self.register_buffer(
            "codes", matrix.codes.clone(memory_format=torch.contiguous_format)
        )  # memory-mapped files are not aligned
        self.register_buffer("scale", matrix.scales.scale.expand(rows, 1)[:, 0].bfloat16().contiguous())

    def forward_kernel(self, x: Tensor) -> Tensor:
        """Compute with the kernel."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)
        return y

    def forward_dense(self, x: Tensor) -> Tensor:
        """Compute in bfloat16, which represents integers up to 256 exactly."""
        return F.linear(x, self.codes.bfloat16()).mul_(self.scale)


class Int4Linear(LowBitLinear):
    """4 bits (also 2 and 3), a scale and a zero point per group of a row."""

    packed: Tensor
    scales: Tensor
    max_kernel_rows = 48

    def __init__(self, matrix: IntegerMatrix, group: int) -> None:
        rows, columns = matrix.codes.shape
        super().__init__((rows, columns))
        self.group = group
        each = columns // group // matrix.scales.scale.shape[1]
        scale, zero = (
            one.expand(rows, -1).float().repeat_interleave(each, 1) for one in (matrix.scales.scale, matrix.scales.zero)
        )
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.int() + 8, 1))
        self.register_buffer(
            "scales", torch.stack([scale, -zero * scale], -1).transpose(0, 1).bfloat16().contiguous()
        )  # [groups, out, 2]

    def forward_kernel(self, x: Tensor) -> Tensor:
        """Compute with the kernel."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales)
        return y

    def forward_dense(self, x: Tensor) -> Tensor:
        """Compute with dequantized weights."""
        weight = _unpack(self.packed).float().view(-1, self.group, self.out_features)
        scale, zero = (one.float()[:, None] for one in self.scales.unbind(-1))
        weight = weight.sub_(8).mul_(scale).add_(zero).bfloat16()  # [groups, group, out]
        return x @ weight.view(self.in_features, self.out_features)


def replace_linear(model: nn.Module, name: str, layer: LowBitLinear) -> None:
    """Replace a linear layer in place, keeping its bias."""
    parent, _, leaf = name.rpartition(".")
    before: nn.Linear = getattr(model.get_submodule(parent), leaf)
    layer.bias = None if before.bias is None else before.bias.detach()
    setattr(model.get_submodule(parent), leaf, layer)


def _unpack(packed: Tensor) -> Tensor:
    """Unpack the kernel's layout to [in, out], uint8.

    Of each 64 rows, column after column, the first 32 are in the lower halves of bytes, the last 32 in the upper.
    """
    blocks, columns = packed.shape[0] // PACKED_ROWS, packed.shape[1] * 2
    halves = packed.view(blocks, columns, PACKED_ROWS // 2).transpose(0, 1)
    made = torch.empty(columns, blocks, 2, PACKED_ROWS // 2, dtype=torch.uint8)
    torch.bitwise_and(halves, 15, out=made[:, :, 0])
    torch.bitwise_right_shift(halves, 4, out=made[:, :, 1])
    return made.view(columns, -1)
