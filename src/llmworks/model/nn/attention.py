"""Multi-head attention with causal, sliding-window, padding, packing and branch masks.

Vaswani et al. 2017 (arXiv:1706.03762). Several query heads may share a key and value head: grouped-query attention
(GQA; Ainslie et al. 2023, arXiv:2305.13245); all share one: multi-query (MQA; Shazeer 2019, arXiv:1911.02150).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.model.nn.cpu_attention import (
    QUERY_BLOCK_SIZE,
    QueryBlocks,
    blockwise_attention,
    slice_block_masks,
    split_query_blocks,
    split_segment_blocks,
)
from llmworks.model.nn.norm import RMSNorm
from llmworks.model.nn.positions import alibi_slopes, apply_rope
from llmworks.model.nn.residual_linear import ResidualLinear
from llmworks.model.nn.segments import get_segment_bounds
from llmworks.model.shape import Shape


@dataclass(frozen=True)
class AttentionMask:
    """Attention mask: `mask` [batch, 1 or heads, queries, keys] is added to the scores.

    Without a mask, attention is full, or causal if `causal`.
    `query_blocks`: query blocks and the keys they need, for self-attention on a CPU (`cpu_attention.py`; only for
    speed).
    `segment_bounds`: packed documents of a single row as (first token, last + 1), which do not attend to one another;
    `mask` is None then. `segment_masks`: additive mask of each document [queries, keys] where documents branch.
    """

    mask: Tensor | None
    causal: bool
    query_blocks: QueryBlocks | None = None
    segment_bounds: tuple[tuple[int, int], ...] = ()
    segment_masks: tuple[Tensor, ...] = ()


def build_attention_mask(
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool = True,
    window: int = 0,
    padding: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    branches: Tensor | None = None,
    alibi: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    block: int = QUERY_BLOCK_SIZE,
) -> AttentionMask:
    """Build the attention mask: causal (if `causal`), sliding `window`, same segment, no padding, ALiBi bias.

    queries, keys: positions [batch, length]; padding [batch, keys], 1 where there is a token; segments: segment ids of
    queries and keys; alibi: slopes [heads]; `block`: query block size on a CPU. branches [batch, length]: within a
    segment 0 for the shared prefix, else the number of the continuation; continuations do not attend to one another,
    and each has positions of its own.
    """
    is_self_attention = causal and queries.shape[1] == keys.shape[1] > 1
    in_blocks = is_self_attention and keys.device.type == "cpu"
    # no mask tensor is needed for purely causal or full attention, where queries are all keys or the last key
    if (
        not window
        and padding is None
        and segments is None
        and alibi is None
        and (not causal or is_self_attention or queries.shape[1] == 1)
    ):
        return AttentionMask(
            None, causal and queries.shape[1] > 1, split_query_blocks(keys.shape[1], None, block) if in_blocks else None
        )
    if is_self_attention and segments is not None and len(segments[1]) == 1 and padding is None and alibi is None:
        parts = get_segment_bounds(segments[1][0])
        if parts and branches is not None and not window:
            masks = tuple(
                _to_additive_mask(_build_branch_mask(queries[0, a:b], branches[0, a:b]), dtype) for a, b in parts
            )
            return AttentionMask(None, True, split_segment_blocks(parts, block) if in_blocks else None, parts, masks)
        if parts and branches is None and (not window or max(end - first for first, end in parts) <= window):
            return AttentionMask(None, True, split_segment_blocks(parts, block) if in_blocks else None, parts)
    distance = queries[:, :, None] - keys[:, None, :]  # [batch, queries, keys]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        allowed = allowed & (distance.abs() < window)
    if padding is not None:
        allowed = allowed & padding[:, None, :].bool()
    if segments is not None:
        allowed = allowed & (segments[0][:, :, None] == segments[1][:, None, :])
    if branches is not None:
        allowed = allowed & _is_visible_branch(branches)
    if padding is not None:
        allowed = allowed | ~allowed.any(-1, keepdim=True)  # a fully masked padding query would give NaN in its softmax
    mask = _to_additive_mask(allowed, dtype)[:, None]
    if alibi is not None:
        mask = (mask - alibi.to(mask)[None, :, None, None] * distance.abs()[:, None].to(dtype)).clamp(
            min=torch.finfo(dtype).min
        )
    return AttentionMask(mask, False, split_query_blocks(keys.shape[1], allowed, block) if in_blocks else None)


def _is_visible_branch(branches: Tensor) -> Tensor:
    """Return [..., queries, keys]: whether a key is in the query's branch or in the shared prefix.

    branches: [..., length].
    """
    return (branches[..., None, :] == 0) | (branches[..., :, None] == branches[..., None, :])


def _build_branch_mask(positions: Tensor, branches: Tensor) -> Tensor:
    """Return the causal mask of one document with branches: [length] each -> [queries, keys]."""
    return (positions[:, None] >= positions[None]) & _is_visible_branch(branches)


def _to_additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into an additive one: 0 where allowed, else the smallest number of `dtype`."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


class Attention(nn.Module):
    """Multi-head attention: [batch, length, hidden_size] -> the same shape."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.num_kv_heads, self.head_size = (
            layer,
            shape.num_attention_heads,
            shape.num_kv_heads,
            shape.head_size,
        )
        self.scale = shape.attention_multiplier or shape.head_size**-0.5
        qkv, out = shape.bias != "none", shape.bias == "all"
        self.query = nn.Linear(shape.hidden_size, self.num_heads * self.head_size, bias=qkv)
        self.key = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_size, bias=qkv)
        self.value = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_size, bias=qkv)
        self.out = ResidualLinear(self.num_heads * self.head_size, shape.hidden_size, bias=out)
        self.query_norm = (
            RMSNorm(self.head_size, shape.norm_eps, unit_offset=shape.norm_unit_offset) if shape.use_qk_norm else None
        )
        self.key_norm = (
            RMSNorm(self.head_size, shape.norm_eps, unit_offset=shape.norm_unit_offset) if shape.use_qk_norm else None
        )

    def forward(
        self,
        x: Tensor,
        attention_mask: AttentionMask,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Compute attention with the output projection.

        `rotation`: RoPE cosine and sine of the positions; `cache`: KV cache (`update(key, value, layer)`).

        `memory` [batch, keys, hidden_size]: cross-attention, keys and values are computed from these states.
        """
        output: Tensor = self.out(self.compute_heads(x, attention_mask, rotation, cache, memory))
        return output

    def compute_heads(
        self,
        x: Tensor,
        attention_mask: AttentionMask,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Compute the heads' outputs [batch, length, heads * head_dim], before the output projection."""
        batch, length, _ = x.shape
        source = x if memory is None else memory
        q = self.query(x).view(batch, length, self.num_heads, self.head_size)
        k = self.key(source).view(batch, -1, self.num_kv_heads, self.head_size)
        v = self.value(source).view(batch, -1, self.num_kv_heads, self.head_size).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [batch, heads, length, head_dim]
        if rotation is not None:
            q, k = apply_rope(q, *rotation), apply_rope(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        blocks, bounds, segment_masks = (
            attention_mask.query_blocks,
            attention_mask.segment_bounds,
            attention_mask.segment_masks,
        )
        whole = memory is None and k.shape[2] == length
        if blocks is not None and whole and q.dtype == v.dtype == torch.float32:
            block_masks = slice_block_masks(blocks, bounds, segment_masks) if segment_masks else None
            output = blockwise_attention(q, k, v, self.scale, attention_mask.mask, blocks, block_masks)
        else:
            repeats = self.num_heads // self.num_kv_heads
            if repeats > 1:
                k, v = repeat_kv(k, repeats), repeat_kv(v, repeats)
            if bounds and memory is None:
                # one call per document: without branches no mask is needed, so the fastest kernels apply
                masks = segment_masks or [None] * len(bounds)
                parts = [(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in bounds]
                outputs = [
                    F.scaled_dot_product_attention(*part, attn_mask=mask, is_causal=mask is None, scale=self.scale)
                    for part, mask in zip(parts, masks, strict=True)
                ]
                output = torch.cat(outputs, dim=2)
            else:
                output = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attention_mask.mask, is_causal=attention_mask.causal, scale=self.scale
                )
        return output.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_size)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """Repeat each key or value head for all query heads of its group (repeat_kv).

    [batch, kv_heads, length, head_dim] -> [batch, kv_heads * times, length, head_dim].
    """
    batch, num_kv_heads, length, width = x.shape
    return (
        x[:, :, None]
        .expand(batch, num_kv_heads, times, length, width)
        .reshape(batch, num_kv_heads * times, length, width)
    )


def get_alibi_slopes(shape: Shape) -> Tensor | None:
    """Return the ALiBi slopes of a shape with ALiBi positions, else None."""
    return alibi_slopes(shape.num_attention_heads) if shape.position_embedding_type == "alibi" else None
