"""Attention in blocks gives PyTorch's numbers and gradients, whatever is hidden from whom, and leaves out what need not
be computed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.model.nn.attention import repeated, seen
from llmworks.model.nn.cpu_attention import BLOCK, block_of, blocks_of, blockwise
from llmworks.model.nn.positions import slopes


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
@pytest.mark.parametrize("block", [block_of(1), block_of(1000)])
def test_the_numbers_and_gradients_of_pytorch(length: int, kind: str, block: int) -> None:
    q, k, v = given(length)
    at = torch.arange(length)[None]
    padding = (
        (torch.arange(length) >= torch.tensor([[0], [length // 3]])).long() if kind in ("padding", "all") else None
    )
    segments = (SEGMENTS[:, :length],) * 2 if kind in ("segments", "all") else None
    look = seen(
        at,
        at,
        window=20 if kind in ("window", "all") else 0,
        padding=padding,
        segments=segments,
        alibi=slopes(6) if kind in ("alibi", "all") else None,
        block=block,
    )
    assert look.blocks is not None
    assert look.blocks[0][1] == min(block, length)
    real = (
        torch.ones(2, 1, length, 1) if padding is None else padding[:, None, :, None].float()
    )  # what padding itself sees is nobody's business
    ours = blockwise(q, k, v, 0.3, look.mask, look.blocks) * real
    grads = torch.autograd.grad((ours * ours.detach().roll(1, 2)).sum(), (q, k, v))
    theirs = (
        F.scaled_dot_product_attention(
            q, repeated(k, 3), repeated(v, 3), attn_mask=look.mask, is_causal=look.causal, scale=0.3
        )
        * real
    )
    expected = torch.autograd.grad((theirs * theirs.detach().roll(1, 2)).sum(), (q, k, v))
    assert (ours - theirs).abs().max() < 1e-5
    for mine, other in zip(grads, expected, strict=True):
        assert (mine - other).abs().max() < 1e-4


def test_gradients_are_those_of_differences() -> None:
    q, k, v = given(70, torch.float64, batch=1, heads=2, groups=1, width=4)
    blocks = blocks_of(70)
    assert torch.autograd.gradcheck(lambda *x: blockwise(*x, 0.5, None, blocks), (q, k, v), fast_mode=True)


def test_what_is_hidden_is_not_computed() -> None:
    at = torch.arange(320)[None]
    assert seen(at, at).blocks == tuple((n, n + BLOCK, 0) for n in range(0, 320, 64))
    windowed = seen(at, at, window=64).blocks
    assert windowed == ((0, 64, 0), (64, 128, 1), (128, 192, 65), (192, 256, 129), (256, 320, 193))
    texts = torch.stack((at[0] // 128, at[0] // 64))
    apart = seen(at, at, segments=(texts, texts)).blocks
    assert apart == (
        (0, 64, 0),
        (64, 128, 0),
        (128, 192, 128),
        (192, 256, 128),
        (256, 320, 256),
    )  # the first row's texts are longer
    assert seen(at[:, -1:], at).blocks is None  # one token after others
    assert seen(at, at, causal=False).blocks is None


def test_not_twice() -> None:
    q, k, v = given(8)
    (grad,) = torch.autograd.grad(blockwise(q, k, v, 0.5, None, blocks_of(8)).square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
