"""Causal attention on a CPU, a block of queries at a time: what causality, a window or another text hides is not
computed, and nothing is kept of it.

The same numbers as `scaled_dot_product_attention`. Queries are taken in blocks and keys are not, so a block's weights
stand whole (32 or 64 rows of them for each head), and there is no running softmax; backward computes them again, as
FlashAttention does (Dao et al. 2022, arXiv:2205.14135). Only for speed: forward and backward with PyTorch's own CPU
kernel take 1.0 to 1.4 times as long, with a mask for packed texts 2.7 to 5.3 (`python benchmarks/model.py
--attention`). Knows no model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK, MANY = 64, 32  # queries at most; half of them where so many heads share the cores' caches
Blocks = tuple[tuple[int, int, int], ...]  # (first query, last + 1, first key that one of them sees)


def block_of(heads: int) -> int:
    """Queries of a block, where there are so many heads in all rows: their weights should stay in the caches."""
    return BLOCK // 2 if heads >= MANY else BLOCK


def blocks_of(length: int, allowed: Tensor | None = None, block: int = BLOCK) -> Blocks:
    """The blocks of rows of `length` tokens, each of which sees itself and all before it, or what is `allowed` [batch
    or 1, queries, keys].
    """
    begins = list(range(0, length, block))
    firsts = [0] * len(begins)
    if allowed is not None:
        nearest = allowed.any(0).int().argmax(-1)  # of each query, in any row
        firsts = [int(part.min()) for part in torch.split(nearest, block)]
    return tuple((at, min(at + block, length), first) for at, first in zip(begins, firsts, strict=True))


def blocks_of_parts(parts: Sequence[tuple[int, int]], block: int = BLOCK) -> Blocks:
    """The blocks of one row of several texts, each (first token, last + 1), none of which sees another; no block has
    tokens of two texts, so that none needs a mask.
    """
    return tuple((at, min(at + block, end), first) for first, end in parts for at in range(first, end, block))


def masks_of_blocks(blocks: Blocks, parts: Sequence[tuple[int, int]], masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of each block, which has tokens of one part only, what is added to its fit [queries, keys], from that of its
    part.
    """
    found, at = [], 0
    for first, end, first_key in blocks:
        while parts[at][1] <= first:
            at += 1
        found.append(
            masks[at][first - parts[at][0] : end - parts[at][0], first_key - parts[at][0] : end - parts[at][0]]
        )
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _later(size: int, dtype: torch.dtype) -> Tensor:
    """[size, size], minus infinity where a key comes after the query."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


class _Blockwise(torch.autograd.Function):
    """Heads of a group are read as more rows of queries, so that keys and values are not repeated for them."""

    @staticmethod
    def forward(
        context: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        mask: Tensor | None,
        blocks: Blocks,
        masks: Sequence[Tensor] | None,
    ) -> Tensor:
        """q: [batch, heads, length, width]; k, v: [batch, groups, length, width]; mask: [batch or 1, heads or 1,
        length, length] -> as q.
        """
        (batch, heads, length, width), groups = q.shape, k.shape[1]
        q, k, v = (
            q.reshape(batch * groups, heads // groups, length, width),
            k.reshape(-1, length, width),
            v.reshape(-1, length, width),
        )
        said = torch.empty_like(q, memory_format=torch.contiguous_format)
        room = q.new_empty(batch * heads * BLOCK * length)
        for number, (first, end, first_key) in enumerate(blocks):
            weights = _weights(
                _rows(q, first, end) * scale,
                k[:, first_key:end],
                _mask(mask, masks, blocks, number),
                (first, end, first_key),
                batch,
                room,
            )
            said[:, :, first:end] = torch.bmm(weights, v[:, first_key:end]).view(len(q), -1, end - first, width)
        context.save_for_backward(q, k, v, said)
        context.rest = (scale, mask, blocks, masks, batch)
        return said.view(batch, heads, length, width)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """FlashAttention, appendix B.2: dV = P' dO, dP = dO V', dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK =
        dS' Q.
        """
        q, k, v, said = context.saved_tensors
        scale, mask, blocks, masks, batch = context.rest
        gradient = gradient.reshape(q.shape)
        inner = (gradient * said).sum(-1, keepdim=True)
        by_q, by_k, by_v = (
            torch.empty_like(said),
            torch.zeros_like(k, memory_format=torch.contiguous_format),
            torch.zeros_like(v, memory_format=torch.contiguous_format),
        )
        room, other = (q.new_empty(q.shape[0] * q.shape[1] * BLOCK * q.shape[2]) for _ in range(2))
        for number, (first, end, first_key) in enumerate(blocks):
            rows, gradients = _rows(q, first, end) * scale, _rows(gradient, first, end)
            weights = _weights(
                rows, k[:, first_key:end], _mask(mask, masks, blocks, number), (first, end, first_key), batch, room
            )
            by_v[:, first_key:end].add_(
                torch.bmm(weights.transpose(1, 2), gradients)
            )  # `baddbmm_` into a part is a loop over matrices
            by_fit = torch.bmm(
                gradients, v[:, first_key:end].transpose(1, 2), out=other[: weights.numel()].view(weights.shape)
            )
            by_fit.sub_(_rows(inner, first, end)).mul_(weights)
            by_k[:, first_key:end].add_(torch.bmm(by_fit.transpose(1, 2), rows))
            by_q[:, :, first:end] = torch.bmm(by_fit, k[:, first_key:end]).view(len(q), -1, end - first, q.shape[-1])
        shape = (batch, -1, *q.shape[2:])
        return by_q.mul_(scale).view(shape), by_k.view(shape), by_v.view(shape), None, None, None, None


def _mask(mask: Tensor | None, masks: Sequence[Tensor] | None, blocks: Blocks, number: int) -> Tensor | None:
    """What is added to a block's fit, as it broadcasts to [batch, heads, queries, keys]."""
    first, end, first_key = blocks[number]
    return masks[number] if masks is not None else None if mask is None else mask[:, :, first:end, first_key:end]


def _rows(x: Tensor, first: int, end: int) -> Tensor:
    """A block's queries, all heads of a group below one another: [rows, heads of a group, length, n] -> [rows, heads of
    a group * block, n].
    """
    return x[:, :, first:end].reshape(len(x), -1, x.shape[-1])


def _weights(
    rows: Tensor, keys: Tensor, mask: Tensor | None, block: tuple[int, int, int], batch: int, room: Tensor
) -> Tensor:
    """How much each query of a block heeds each key, in `room`: [rows, heads of a group * block, keys]."""
    first, end, first_key = block
    fit = torch.bmm(
        rows,
        keys.transpose(1, 2),
        out=room[: rows.shape[0] * rows.shape[1] * keys.shape[1]].view(*rows.shape[:2], keys.shape[1]),
    )
    by_head = fit.view(batch, -1, end - first, end - first_key)
    if mask is None:
        by_head[..., first - first_key :].add_(_later(BLOCK, fit.dtype)[: end - first, : end - first])
    else:
        by_head.add_(mask)
    return torch.softmax(fit, -1, out=fit)


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    blocks: Blocks,
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Causal attention: q [batch, heads, length, width]; k, v [batch, groups, length, width] -> as q.

    Not differentiable twice.

    `mask` [batch or 1, heads or 1, length, length] is added to the fit and must hide what is later itself; without one
    that is done here. `masks`: the same of each block.
    """
    said: Tensor = _Blockwise.apply(q, k, v, scale, mask, blocks, masks)  # type: ignore[no-untyped-call]
    return said
