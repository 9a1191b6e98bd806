"""Integer quantization of weights: a scale, and for asymmetric grids a zero point, per tensor, row, or group.

Pure tensor functions. Absmax and zero-point quantization as in Jacob et al. 2018 (arXiv:1712.05877), section 2.1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.activations import InputQuantization

SHRINK_FACTORS = tuple(1 - 0.02 * step for step in range(30))  # range factors tried by the MSE search


@dataclass(frozen=True)
class Grid:
    """Integer grid of the quantized weights.

    `group`: group size, weights of a row that share a scale (0: per row, -1: per tensor); `symmetric`: no zero point.

    `edge`: which value the largest weight maps to on a symmetric grid: "last", the largest integer (127 for 8 bits,
    absmax), or "between" it and the next (127.5, as in compressed-tensors).
    `stored`: number format in which scales are stored; they are rounded to it before use. `inputs`: quantization of the
    layer's inputs (None: not quantized).
    `real_zero_points`: zero points are stored like scales and need not be integers.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    edge: Literal["last", "between"] = "last"
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    inputs: InputQuantization | None = None
    real_zero_points: bool = False

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1

    def get_group_size(self, columns: int) -> int:
        """Return the group size in a row of `columns` weights. ModelError if groups do not divide the row."""
        size = self.group if self.group > 0 else columns
        if columns % size:
            near = [n for n in (16, 32, 48, 64, 96, 128, 192, 256) if columns % n == 0]
            raise ModelError(
                f"rows of {columns} weights are not divisible by group size {size}"
                + (f"; possible: {', '.join(map(str, near))}" if near else "; use group size 0, one scale per row")
            )
        return size


@dataclass(frozen=True)
class Scales:
    """Scales and zero points: weight = (integer - zero) * scale.

    Each [rows, groups], per tensor [1, 1]; `zero` holds integers (unless `real_zero_points`), 0 on a symmetric grid.
    """

    scale: Tensor
    zero: Tensor


def split_groups(weight: Tensor, grid: Grid) -> Tensor:
    """Reshape [rows, columns] to [rows, groups, size]; one group of all weights for a per-tensor scale."""
    if grid.group == -1:
        return weight.reshape(1, 1, -1)
    return weight.reshape(len(weight), -1, grid.get_group_size(weight.shape[1]))


@dataclass(frozen=True)
class Extremes:
    """Minimum and maximum of groups [rows, groups], extended to 0; both the absolute maximum on a symmetric grid."""

    smallest: Tensor
    largest: Tensor

    def compute_scales(self, grid: Grid, shrink: float | Tensor = 1.0) -> Scales:
        """Return the scales for a factor of this range, one for all or [rows, groups]. Zero groups have scale 1."""
        if grid.symmetric:
            scale = _round_scales(self.largest * shrink / (grid.high if grid.edge == "last" else grid.high + 0.5), grid)
            return Scales(scale, torch.zeros_like(scale))
        smallest, largest = self.smallest * shrink, self.largest * shrink
        scale = _round_scales((largest - smallest) / (grid.high - grid.low), grid)
        zero = grid.low - smallest / scale
        return Scales(
            scale, round_zero_points(zero, grid) if grid.real_zero_points else zero.round().clamp(grid.low, grid.high)
        )


def compute_extremes(groups: Tensor, grid: Grid) -> Extremes:
    """Return the extremes of groups [rows, groups, size]."""
    if grid.symmetric:
        most = groups.abs().amax(-1)
        return Extremes(most, most)
    return Extremes(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0))


def fit_scales(groups: Tensor, grid: Grid) -> Scales:
    """Return the min-max scales of groups [rows, groups, size]."""
    return compute_extremes(groups, grid).compute_scales(grid)


def round_zero_points(zero: Tensor, grid: Grid) -> Tensor:
    """Round real zero points as they are stored in the file, where integers count from 0."""
    return (zero - grid.low).to(getattr(torch, grid.stored)).to(zero.dtype) + grid.low


def _round_scales(scale: Tensor, grid: Grid) -> Tensor:
    """Round scales to their stored format; 1 where there is nothing to scale."""
    scale = scale.to(getattr(torch, grid.stored)).to(scale.dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def search_scales(
    groups: Tensor, grid: Grid, weights: Tensor | None = None, shrink: tuple[float, ...] = SHRINK_FACTORS
) -> Scales:
    """Search the scales with the lowest squared error over factors of the range.

    `weights` [groups, size] or like groups: weight of each element's error.
    """
    ends = compute_extremes(groups, grid)
    best = ends.compute_scales(grid)
    least = _compute_error(groups, best, grid, weights)
    for share in shrink[1:]:
        candidate = ends.compute_scales(grid, share)
        error = _compute_error(groups, candidate, grid, weights)
        better = error < least
        best = Scales(torch.where(better, candidate.scale, best.scale), torch.where(better, candidate.zero, best.zero))
        least = torch.where(better, error, least)
    return best


def _compute_error(groups: Tensor, scales: Scales, grid: Grid, weights: Tensor | None) -> Tensor:
    difference = (dequantize_groups(quantize_groups(groups, scales, grid), scales) - groups).square_()
    return (difference if weights is None else difference.mul_(weights)).sum(-1)


def quantize_groups(groups: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Quantize groups [rows, groups, size] to integers, in the tensor's own number format."""
    return (groups / scales.scale[..., None] + scales.zero[..., None]).round_().clamp_(grid.low, grid.high)


def dequantize_groups(codes: Tensor, scales: Scales) -> Tensor:
    """Dequantize to [rows, groups, size]."""
    return (codes.to(scales.scale.dtype) - scales.zero[..., None]) * scales.scale[..., None]


@dataclass(frozen=True)
class IntegerMatrix:
    """An integer-quantized matrix. codes: [rows, columns], int8; columns in the order of the weights."""

    codes: Tensor
    scales: Scales
    grid: Grid

    def weight(self) -> Tensor:
        """Dequantize to [rows, columns], in the scales' number format."""
        return dequantize_groups(split_groups(self.codes, self.grid), self.scales).reshape(self.codes.shape)

    @property
    def bits(self) -> float:
        """Bits per weight, scales and zero points included (scales in 16 bits)."""
        return (
            self.grid.bits
            + self.scales.scale.numel()
            * (16 + (0 if self.grid.symmetric else 16 if self.grid.real_zero_points else self.grid.bits))
            / self.codes.numel()
        )


def quantize_matrix(weight: Tensor, grid: Grid, scales: Scales | None = None) -> IntegerMatrix:
    """Quantize a matrix [rows, columns], round to nearest (RTN).

    `scales`: in place of min-max scales. ModelError for weights that are NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are NaN or infinite")
    groups = split_groups(weight, grid)
    scales = scales or fit_scales(groups, grid)
    return IntegerMatrix(quantize_groups(groups, scales, grid).reshape(weight.shape).to(torch.int8), scales, grid)


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Pack integers [rows, columns] of -2^(bits-1) and up into int32 [rows, ceil(columns * bits / 32)].

    Bits are contiguous, the first integer in the lowest bits (compressed-tensors' layout).
    """
    import numpy as np

    rows, columns = codes.shape
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).cpu().numpy()
    each = 8 // bits
    if 8 % bits == 0 and columns % (4 * each) == 0:  # no integer crosses a word boundary
        parts = [unsigned[:, at::each] << (at * bits) for at in range(each)]
        return torch.from_numpy(functools.reduce(np.bitwise_or, parts).view("<i4").astype(np.int32, copy=False)).to(
            codes.device
        )
    bit_array = np.unpackbits(unsigned[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, columns * bits)
    whole_words = np.zeros((rows, -(-columns * bits // 32) * 4), np.uint8)
    made = np.packbits(bit_array, axis=1, bitorder="little")
    whole_words[:, : made.shape[1]] = made
    return torch.from_numpy(whole_words.view("<i4").astype(np.int32, copy=False)).to(codes.device)


def unpack_integers(words: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack_integers`: int8 [rows, columns]. ValueError for words that do not match."""
    import numpy as np

    if words.dtype != torch.int32 or words.ndim != 2 or not 0 < bits <= 8 or words.shape[1] != -(-columns * bits // 32):
        raise ValueError(
            f"{tuple(words.shape)} words of {str(words.dtype).removeprefix('torch.')} are not {columns} integers of"
            f" {bits} bits per row"
        )
    octets = words.contiguous().cpu().numpy().astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        unsigned = np.empty((len(words), octets.shape[1] * (8 // bits)), np.uint8)
        for at in range(8 // bits):
            unsigned[:, at :: 8 // bits] = octets >> (at * bits) & ((1 << bits) - 1)
        unsigned = unsigned[:, :columns]
    else:
        bit_array = np.unpackbits(octets, axis=1, count=columns * bits, bitorder="little")
        unsigned = np.packbits(bit_array.reshape(len(words), columns, bits), axis=2, bitorder="little")[:, :, 0]
    return (torch.from_numpy(unsigned).to(torch.int16) - (1 << (bits - 1))).to(torch.int8).to(words.device)
