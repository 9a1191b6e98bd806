"""Causal attention on a CPU in blocks of queries: masked key ranges are skipped and attention weights are not stored.

Gives the same result as `scaled_dot_product_attention`. Only queries are blocked, so a block's weights are complete (32
or 64 rows per head) and no online softmax is needed; the backward pass recomputes them, as FlashAttention does (Dao et
al. 2022, arXiv:2205.14135). Only for speed: PyTorch's own CPU kernel takes 1.0 to 1.4 times as long forward and
backward, with a mask for packed documents 2.7 to 5.3 times (`python benchmarks/model.py --attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK, MANY = 64, 32  # query block size; halved from MANY_HEADS on, since all heads share the cores' caches
Blocks = tuple[tuple[int, int, int], ...]  # (first query, last + 1, first key that any of them attends to)


def block_of(heads: int) -> int:
    """Return the query block size for a total number of heads, so that attention weights stay in the CPU caches."""
    return BLOCK // 2 if heads >= MANY else BLOCK


def blocks_of(length: int, allowed: Tensor | None = None, block: int = BLOCK) -> Blocks:
    """Return the query blocks of rows of `length` tokens: causal, or by `allowed` [batch or 1, queries, keys]."""
    begins = list(range(0, length, block))
    firsts = [0] * len(begins)
    if allowed is not None:
        nearest = allowed.any(0).int().argmax(-1)  # first allowed key of each query, in any row
        firsts = [int(part.min()) for part in torch.split(nearest, block)]
    return tuple((at, min(at + block, length), first) for at, first in zip(begins, firsts, strict=True))


def blocks_of_parts(parts: Sequence[tuple[int, int]], block: int = BLOCK) -> Blocks:
    """Return the query blocks of one row of packed documents, each (first token, last + 1).

    No block spans two documents, so none needs a mask.
    """
    return tuple((at, min(at + block, end), first) for first, end in parts for at in range(first, end, block))


def masks_of_blocks(blocks: Blocks, parts: Sequence[tuple[int, int]], masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each block's additive mask [queries, keys], cut from that of its document."""
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
    """Return the [size, size] causal mask, minus infinity where a key comes after the query."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


class _Blockwise(torch.autograd.Function):
    """Blockwise attention; heads of a GQA group become more query rows, so that keys and values are not repeated."""

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
        """Compute attention block by block.

        q: [batch, heads, length, head_dim]; k, v: [batch, kv_heads, length, head_dim]; mask: [batch or 1, heads or 1,
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
        """Compute gradients as in FlashAttention, appendix B.2, recomputing the weights P.

        dV = P' dO, dP = dO V', dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS' Q.
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
            )  # `baddbmm_` into a slice would loop over matrices
            by_fit = torch.bmm(
                gradients, v[:, first_key:end].transpose(1, 2), out=other[: weights.numel()].view(weights.shape)
            )
            by_fit.sub_(_rows(inner, first, end)).mul_(weights)
            by_k[:, first_key:end].add_(torch.bmm(by_fit.transpose(1, 2), rows))
            by_q[:, :, first:end] = torch.bmm(by_fit, k[:, first_key:end]).view(len(q), -1, end - first, q.shape[-1])
        shape = (batch, -1, *q.shape[2:])
        return by_q.mul_(scale).view(shape), by_k.view(shape), by_v.view(shape), None, None, None, None


def _mask(mask: Tensor | None, masks: Sequence[Tensor] | None, blocks: Blocks, number: int) -> Tensor | None:
    """Return a block's additive mask, broadcastable to [batch, heads, queries, keys]."""
    first, end, first_key = blocks[number]
    return masks[number] if masks is not None else None if mask is None else mask[:, :, first:end, first_key:end]


def _rows(x: Tensor, first: int, end: int) -> Tensor:
    """Stack a block's queries of all heads of a group.

    [rows, heads per group, length, n] -> [rows, heads per group * block, n].
    """
    return x[:, :, first:end].reshape(len(x), -1, x.shape[-1])


def _weights(
    rows: Tensor, keys: Tensor, mask: Tensor | None, block: tuple[int, int, int], batch: int, room: Tensor
) -> Tensor:
    """Compute a block's attention weights in `buffer`: [rows, heads per group * block, keys]."""
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
    """Compute causal attention: q [batch, heads, length, head_dim]; k, v [batch, kv_heads, length, head_dim] -> as q.

    Not differentiable twice.

    `mask` [batch or 1, heads or 1, length, length] is added to the scores and must include causality; without a mask
    causality is applied here. `block_masks`: additive mask of each block.
    """
    said: Tensor = _Blockwise.apply(q, k, v, scale, mask, blocks, masks)  # type: ignore[no-untyped-call]
    return said
