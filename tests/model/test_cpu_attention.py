"""Attention in blocks gives PyTorch's numbers and gradients, whatever is hidden from whom, and leaves out what need not
be computed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.model.nn.attention import build_attention_mask, repeat_kv
from llmworks.model.nn.cpu_attention import (
    QUERY_BLOCK_SIZE,
    blockwise_attention,
    get_query_block_size,
    split_query_blocks,
)
from llmworks.model.nn.positions import alibi_slopes


def given(
    length: int, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 6, groups: int = 2, width: int = 16
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    # as the decoder has them: heads behind length in memory
    return [
        torch.randn(batch, length, n, width, generator=draw, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads, groups, groups)
    ]


SEGMENTS = torch.cat((torch.arange(150) // 70, torch.full((10,), -1)))[None].repeat(
    2, 1
)  # and padding, as packed rows have it
SEGMENTS[1] = torch.arange(160) // 30


@pytest.mark.parametrize("length", [2, 63, 64, 65, 160])
@pytest.mark.parametrize("kind", ["plain", "window", "segments", "alibi", "padding", "all"])
@pytest.mark.parametrize("block", [get_query_block_size(1), get_query_block_size(1000)])
def test_the_numbers_and_gradients_of_pytorch(length: int, kind: str, block: int) -> None:
    q, k, v = given(length)
    at = torch.arange(length)[None]
    padding = (
        (torch.arange(length) >= torch.tensor([[0], [length // 3]])).long() if kind in ("padding", "all") else None
    )
    segments = (SEGMENTS[:, :length],) * 2 if kind in ("segments", "all") else None
    look = build_attention_mask(
        at,
        at,
        window=20 if kind in ("window", "all") else 0,
        padding=padding,
        segments=segments,
        alibi=alibi_slopes(6) if kind in ("alibi", "all") else None,
        block=block,
    )
    assert look.query_blocks is not None
    assert look.query_blocks[0][1] == min(block, length)
    real = (
        torch.ones(2, 1, length, 1) if padding is None else padding[:, None, :, None].float()
    )  # what padding itself sees is nobody's business
    ours = blockwise_attention(q, k, v, 0.3, look.mask, look.query_blocks) * real
    grads = torch.autograd.grad((ours * ours.detach().roll(1, 2)).sum(), (q, k, v))
    theirs = (
        F.scaled_dot_product_attention(
            q, repeat_kv(k, 3), repeat_kv(v, 3), attn_mask=look.mask, is_causal=look.causal, scale=0.3
        )
        * real
    )
    expected = torch.autograd.grad((theirs * theirs.detach().roll(1, 2)).sum(), (q, k, v))
    assert (ours - theirs).abs().max() < 1e-5
    for mine, other in zip(grads, expected, strict=True):
        assert (mine - other).abs().max() < 1e-4


def test_gradients_are_those_of_differences() -> None:
    q, k, v = given(70, torch.float64, batch=1, heads=2, groups=1, width=4)
    blocks = split_query_blocks(70)
    assert torch.autograd.gradcheck(lambda *x: blockwise_attention(*x, 0.5, None, blocks), (q, k, v), fast_mode=True)


def test_what_is_hidden_is_not_computed() -> None:
    at = torch.arange(320)[None]
    assert build_attention_mask(at, at).query_blocks == tuple((n, n + QUERY_BLOCK_SIZE, 0) for n in range(0, 320, 64))
    windowed = build_attention_mask(at, at, window=64).query_blocks
    assert windowed == ((0, 64, 0), (64, 128, 1), (128, 192, 65), (192, 256, 129), (256, 320, 193))
    texts = torch.stack((at[0] // 128, at[0] // 64))
    apart = build_attention_mask(at, at, segments=(texts, texts)).query_blocks
    assert apart == (
        (0, 64, 0),
        (64, 128, 0),
        (128, 192, 128),
        (192, 256, 128),
        (256, 320, 256),
    )  # the first row's texts are longer
    assert build_attention_mask(at[:, -1:], at).query_blocks is None  # one token after others
    assert build_attention_mask(at, at, causal=False).query_blocks is None


def test_not_twice() -> None:
    q, k, v = given(8)
    (grad,) = torch.autograd.grad(
        blockwise_attention(q, k, v, 0.5, None, split_query_blocks(8)).square().sum(), (q,), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
