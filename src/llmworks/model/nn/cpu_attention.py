"""Causal attention on a CPU in blocks of queries: masked key ranges are skipped and attention weights are not stored.

Gives the same result as `scaled_dot_product_attention`. Only queries are blocked, so a block's weights are complete (32
or 64 rows per head) and no online softmax is needed; the backward pass recomputes them, as FlashAttention does (Dao et
al. 2022, arXiv:2205.14135). Only for speed: PyTorch's own CPU kernel takes 1.0 to 1.4 times as long forward and
backward, with a mask for packed documents 2.7 to 5.3 times (`python benchmarks/model.py --attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK_SIZE, MANY_HEADS = (
    64,
    32,
)  # query block size; halved from MANY_HEADS on, since all heads share the cores' caches
QueryBlocks = tuple[tuple[int, int, int], ...]  # (first query, last + 1, first key that any of them attends to)


def get_query_block_size(heads: int) -> int:
    """Return the query block size for a total number of heads, so that attention weights stay in the CPU caches."""
    return QUERY_BLOCK_SIZE // 2 if heads >= MANY_HEADS else QUERY_BLOCK_SIZE


def split_query_blocks(length: int, allowed: Tensor | None = None, block: int = QUERY_BLOCK_SIZE) -> QueryBlocks:
    """Return the query blocks of rows of `length` tokens: causal, or by `allowed` [batch or 1, queries, keys]."""
    begins = list(range(0, length, block))
    firsts = [0] * len(begins)
    if allowed is not None:
        nearest = allowed.any(0).int().argmax(-1)  # first allowed key of each query, in any row
        firsts = [int(part.min()) for part in torch.split(nearest, block)]
    return tuple((at, min(at + block, length), first) for at, first in zip(begins, firsts, strict=True))


def split_segment_blocks(segment_bounds: Sequence[tuple[int, int]], block: int = QUERY_BLOCK_SIZE) -> QueryBlocks:
    """Return the query blocks of one row of packed documents, each (first token, last + 1).

    No block spans two documents, so none needs a mask.
    """
    return tuple((at, min(at + block, end), first) for first, end in segment_bounds for at in range(first, end, block))


def slice_block_masks(
    blocks: QueryBlocks, segment_bounds: Sequence[tuple[int, int]], masks: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return each block's additive mask [queries, keys], cut from that of its document."""
    block_masks, at = [], 0
    for first, end, first_key in blocks:
        while segment_bounds[at][1] <= first:
            at += 1
        block_masks.append(
            masks[at][
                first - segment_bounds[at][0] : end - segment_bounds[at][0],
                first_key - segment_bounds[at][0] : end - segment_bounds[at][0],
            ]
        )
    return tuple(block_masks)


@functools.lru_cache(maxsize=8)
def _causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    """Return the [size, size] causal mask, minus infinity where a key comes after the query."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


class _BlockwiseAttention(torch.autograd.Function):
    """Blockwise attention; heads of a GQA group become more query rows, so that keys and values are not repeated."""

    @staticmethod
    def forward(
        context: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        mask: Tensor | None,
        blocks: QueryBlocks,
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
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        buffer = q.new_empty(batch * heads * QUERY_BLOCK_SIZE * length)
        for number, (first, end, first_key) in enumerate(blocks):
            weights = _compute_weights(
                _stack_queries(q, first, end) * scale,
                k[:, first_key:end],
                _slice_mask(mask, masks, blocks, number),
                (first, end, first_key),
                batch,
                buffer,
            )
            output[:, :, first:end] = torch.bmm(weights, v[:, first_key:end]).view(len(q), -1, end - first, width)
        context.save_for_backward(q, k, v, output)
        context.rest = (scale, mask, blocks, masks, batch)
        return output.view(batch, heads, length, width)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients as in FlashAttention, appendix B.2, recomputing the weights P.

        dV = P' dO, dP = dO V', dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS' Q.
        """
        q, k, v, output = context.saved_tensors
        scale, mask, blocks, masks, batch = context.rest
        gradient = gradient.reshape(q.shape)
        inner = (gradient * output).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = (
            torch.empty_like(output),
            torch.zeros_like(k, memory_format=torch.contiguous_format),
            torch.zeros_like(v, memory_format=torch.contiguous_format),
        )
        buffer, grad_buffer = (q.new_empty(q.shape[0] * q.shape[1] * QUERY_BLOCK_SIZE * q.shape[2]) for _ in range(2))
        for number, (first, end, first_key) in enumerate(blocks):
            rows, gradients = _stack_queries(q, first, end) * scale, _stack_queries(gradient, first, end)
            weights = _compute_weights(
                rows,
                k[:, first_key:end],
                _slice_mask(mask, masks, blocks, number),
                (first, end, first_key),
                batch,
                buffer,
            )
            grad_v[:, first_key:end].add_(
                torch.bmm(weights.transpose(1, 2), gradients)
            )  # `baddbmm_` into a slice would loop over matrices
            grad_scores = torch.bmm(
                gradients, v[:, first_key:end].transpose(1, 2), out=grad_buffer[: weights.numel()].view(weights.shape)
            )
            grad_scores.sub_(_stack_queries(inner, first, end)).mul_(weights)
            grad_k[:, first_key:end].add_(torch.bmm(grad_scores.transpose(1, 2), rows))
            grad_q[:, :, first:end] = torch.bmm(grad_scores, k[:, first_key:end]).view(
                len(q), -1, end - first, q.shape[-1]
            )
        shape = (batch, -1, *q.shape[2:])
        return grad_q.mul_(scale).view(shape), grad_k.view(shape), grad_v.view(shape), None, None, None, None


def _slice_mask(mask: Tensor | None, masks: Sequence[Tensor] | None, blocks: QueryBlocks, number: int) -> Tensor | None:
    """Return a block's additive mask, broadcastable to [batch, heads, queries, keys]."""
    first, end, first_key = blocks[number]
    return masks[number] if masks is not None else None if mask is None else mask[:, :, first:end, first_key:end]


def _stack_queries(x: Tensor, first: int, end: int) -> Tensor:
    """Stack a block's queries of all heads of a group.

    [rows, heads per group, length, n] -> [rows, heads per group * block, n].
    """
    return x[:, :, first:end].reshape(len(x), -1, x.shape[-1])


def _compute_weights(
    rows: Tensor, keys: Tensor, mask: Tensor | None, block: tuple[int, int, int], batch: int, buffer: Tensor
) -> Tensor:
    """Compute a block's attention weights in `buffer`: [rows, heads per group * block, keys]."""
    first, end, first_key = block
    scores = torch.bmm(
        rows,
        keys.transpose(1, 2),
        out=buffer[: rows.shape[0] * rows.shape[1] * keys.shape[1]].view(*rows.shape[:2], keys.shape[1]),
    )
    by_head = scores.view(batch, -1, end - first, end - first_key)
    if mask is None:
        by_head[..., first - first_key :].add_(
            _causal_mask(QUERY_BLOCK_SIZE, scores.dtype)[: end - first, : end - first]
        )
    else:
        by_head.add_(mask)
    return torch.softmax(scores, -1, out=scores)


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    blocks: QueryBlocks,
    block_masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute causal attention: q [batch, heads, length, head_dim]; k, v [batch, kv_heads, length, head_dim] -> as q.

    Not differentiable twice.

    `mask` [batch or 1, heads or 1, length, length] is added to the scores and must include causality; without a mask
    causality is applied here. `block_masks`: additive mask of each block.
    """
    attend: Callable[..., Tensor] = _BlockwiseAttention.apply
    return attend(q, k, v, scale, mask, blocks, block_masks)
