"""Weights as whole numbers: a scale, and a zero point where the range need not be even, for a matrix, a row, or a group
of a row.

Pure tensor functions.

Absmax and zero-point quantization as in Jacob et al. 2018 (arXiv:1712.05877), section 2.1. Knows no model and no file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.activations import Reading

SHRINK = tuple(1 - 0.02 * step for step in range(30))  # shares of the range that a search tries


@dataclass(frozen=True)
class Grid:
    """Which whole numbers weights become.

    `group`: weights of a row that share a scale (0: all of a row, -1: all of a matrix); `symmetric`: no zero point.

    `edge`: where the largest weight comes to lie on a symmetric grid: on the last number that has a negative (127 of 8
    bits, absmax), or between it and the next (127.5, as compressed-tensors has it).
    `stored`: the number format that scales are kept in, and rounded to before anything is rounded by them. `inputs`:
    how what the weights are multiplied by is rounded (None: it is not).
    `real`: zero points are kept as scales are, and need be no whole numbers.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    edge: Literal["last", "between"] = "last"
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    inputs: Reading | None = None
    real: bool = False

    @property
    def low(self) -> int:
        """The smallest number."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest number."""
        return (1 << (self.bits - 1)) - 1

    def size(self, columns: int) -> int:
        """Weights of a row that share a scale. ModelError for a row that the groups do not divide."""
        size = self.group if self.group > 0 else columns
        if columns % size:
            near = [n for n in (16, 32, 48, 64, 96, 128, 192, 256) if columns % n == 0]
            raise ModelError(
                f"rows of {columns} weights are not divided by groups of {size}"
                + (f"; they are by {', '.join(map(str, near))}" if near else "; take group 0, one scale a row")
            )
        return size


@dataclass(frozen=True)
class Scales:
    """What whole numbers are worth: (number - zero) * scale.

    Each [rows, groups], of a matrix [1, 1]; `zero` holds whole numbers (but where they may be real), 0 on a symmetric
    grid.
    """

    scale: Tensor
    zero: Tensor


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """[rows, columns] -> [rows, groups, size]; one group of all where the matrix shares a scale."""
    if grid.group == -1:
        return weight.reshape(1, 1, -1)
    return weight.reshape(len(weight), -1, grid.size(weight.shape[1]))


@dataclass(frozen=True)
class Extremes:
    """The smallest and the largest weight of groups [rows, groups], 0 among them; on a symmetric grid the largest of
    their sizes is both.
    """

    smallest: Tensor
    largest: Tensor

    def scales(self, grid: Grid, shrink: float | Tensor = 1.0) -> Scales:
        """The scales by a share of these, one for all or [rows, groups]. A group of zeros has scale 1."""
        if grid.symmetric:
            scale = _kept(self.largest * shrink / (grid.high if grid.edge == "last" else grid.high + 0.5), grid)
            return Scales(scale, torch.zeros_like(scale))
        smallest, largest = self.smallest * shrink, self.largest * shrink
        scale = _kept((largest - smallest) / (grid.high - grid.low), grid)
        zero = grid.low - smallest / scale
        return Scales(scale, kept_zero(zero, grid) if grid.real else zero.round().clamp(grid.low, grid.high))


def extremes(groups: Tensor, grid: Grid) -> Extremes:
    """Of groups [rows, groups, size]."""
    if grid.symmetric:
        most = groups.abs().amax(-1)
        return Extremes(most, most)
    return Extremes(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0))


def fit(groups: Tensor, grid: Grid) -> Scales:
    """The scales of groups [rows, groups, size] by their largest and smallest weight."""
    return extremes(groups, grid).scales(grid)


def kept_zero(zero: Tensor, grid: Grid) -> Tensor:
    """Real zero points as the file will have them, where numbers are counted from 0."""
    return (zero - grid.low).to(getattr(torch, grid.stored)).to(zero.dtype) + grid.low


def _kept(scale: Tensor, grid: Grid) -> Tensor:
    """As the file will have them; 1 where there is nothing to scale."""
    scale = scale.to(getattr(torch, grid.stored)).to(scale.dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def searched(groups: Tensor, grid: Grid, weights: Tensor | None = None, shrink: tuple[float, ...] = SHRINK) -> Scales:
    """The scales of least squared error, of those for shares of the range.

    `weights` [groups, size] or like groups: how much each weight's error counts.
    """
    ends = extremes(groups, grid)
    best = ends.scales(grid)
    least = _error(groups, best, grid, weights)
    for share in shrink[1:]:
        tried = ends.scales(grid, share)
        error = _error(groups, tried, grid, weights)
        better = error < least
        best = Scales(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
        least = torch.where(better, error, least)
    return best


def _error(groups: Tensor, scales: Scales, grid: Grid, weights: Tensor | None) -> Tensor:
    apart = (restored(rounded(groups, scales, grid), scales) - groups).square_()
    return (apart if weights is None else apart.mul_(weights)).sum(-1)


def rounded(groups: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Whole numbers [rows, groups, size] of groups; of the same kind of tensor as they are."""
    return (groups / scales.scale[..., None] + scales.zero[..., None]).round_().clamp_(grid.low, grid.high)


def restored(codes: Tensor, scales: Scales) -> Tensor:
    """Weights again, [rows, groups, size]."""
    return (codes.to(scales.scale.dtype) - scales.zero[..., None]) * scales.scale[..., None]


@dataclass(frozen=True)
class Whole:
    """A matrix as whole numbers. codes: [rows, columns], int8; columns stand in the order of the weights."""

    codes: Tensor
    scales: Scales
    grid: Grid

    def weight(self) -> Tensor:
        """[rows, columns], in the scales' number format."""
        return restored(grouped(self.codes, self.grid), self.scales).reshape(self.codes.shape)

    @property
    def bits(self) -> float:
        """Bits of a weight, scales and zero points included (scales in 16 bits)."""
        return (
            self.grid.bits
            + self.scales.scale.numel()
            * (16 + (0 if self.grid.symmetric else 16 if self.grid.real else self.grid.bits))
            / self.codes.numel()
        )


def whole(weight: Tensor, grid: Grid, scales: Scales | None = None) -> Whole:
    """Round a matrix [rows, columns] to the nearest whole numbers.

    `scales`: other than those of its largest weights. ModelError for weights that are no numbers.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{int((~torch.isfinite(weight)).sum())} of its weights are no numbers (NaN or infinite)")
    groups = grouped(weight, grid)
    scales = scales or fit(groups, grid)
    return Whole(rounded(groups, scales, grid).reshape(weight.shape).to(torch.int8), scales, grid)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [rows, columns] of -2^(bits-1) and more, bit after bit, as int32 [rows, ceil(columns * bits / 32)];
    the first in the lowest bits (compressed-tensors' layout).
    """
    import numpy as np

    rows, columns = codes.shape
    plain = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).cpu().numpy()
    each = 8 // bits
    if 8 % bits == 0 and columns % (4 * each) == 0:  # whole words of whole numbers
        parts = [plain[:, at::each] << (at * bits) for at in range(each)]
        return torch.from_numpy(functools.reduce(np.bitwise_or, parts).view("<i4").astype(np.int32, copy=False)).to(
            codes.device
        )
    single = np.unpackbits(plain[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, columns * bits)
    whole_words = np.zeros((rows, -(-columns * bits // 32) * 4), np.uint8)
    made = np.packbits(single, axis=1, bitorder="little")
    whole_words[:, : made.shape[1]] = made
    return torch.from_numpy(whole_words.view("<i4").astype(np.int32, copy=False)).to(codes.device)


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The reverse of `packed`, int8 [rows, columns]. ValueError for words that are not so many numbers."""
    import numpy as np

    if words.dtype != torch.int32 or words.ndim != 2 or not 0 < bits <= 8 or words.shape[1] != -(-columns * bits // 32):
        raise ValueError(
            f"{tuple(words.shape)} words of {str(words.dtype).removeprefix('torch.')} are not {columns} numbers of"
            f" {bits} bits a row"
        )
    octets = words.contiguous().cpu().numpy().astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        plain = np.empty((len(words), octets.shape[1] * (8 // bits)), np.uint8)
        for at in range(8 // bits):
            plain[:, at :: 8 // bits] = octets >> (at * bits) & ((1 << bits) - 1)
        plain = plain[:, :columns]
    else:
        single = np.unpackbits(octets, axis=1, count=columns * bits, bitorder="little")
        plain = np.packbits(single.reshape(len(words), columns, bits), axis=2, bitorder="little")[:, :, 0]
    return (torch.from_numpy(plain).to(torch.int16) - (1 << (bits - 1))).to(torch.int8).to(words.device)
