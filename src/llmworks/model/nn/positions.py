"""Position encodings: RoPE and its scaling, sinusoidal embeddings, ALiBi slopes. Pure functions of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmworks.model.shape import Rope


def rope_frequencies(rope: Rope, width: int, context: int) -> tuple[Tensor, float]:
    """Return RoPE's (angle per position of each pair of dimensions [head_dim / 2], factor of cosine and sine).

    linear: position interpolation (Chen et al. 2023, arXiv:2306.15595). ntk: larger base, so that the longest wave is
    stretched by `factor` and the shortest is kept. yarn: Peng et al. 2023 (arXiv:2309.00071), section 3: pairs with
    more than `beta_fast` rotations within the trained context are kept, those with less than `beta_slow` are divided by
    `factor`, with a ramp between; attention is sharpened by 0.1 ln(factor) + 1. llama3: Llama 3.1's scaling.
    """
    theta = rope.rope_theta
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    if rope.rope_type == "ntk":
        theta *= rope.factor ** (width / (width - 2))
    kept: Tensor = 1.0 / theta**powers
    if rope.rope_type in ("default", "ntk") or rope.factor == 1:
        return kept, 1.0
    divided = kept / rope.factor
    if rope.rope_type == "linear":
        return divided, 1.0
    trained = rope.original_max_position_embeddings or context / rope.factor
    if rope.rope_type == "llama3":
        turns = trained * kept / (2 * math.pi)
        share = ((turns - rope.beta_slow) / (rope.beta_fast - rope.beta_slow)).clamp(0, 1)
        return divided * (1 - share) + kept * share, 1.0
    low, high = (
        width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )  # indices of the pairs with this many rotations
    first, last = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    share = ((torch.arange(width // 2, dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0, 1)
    return kept * (1 - share) + divided * share, 0.1 * math.log(rope.factor) + 1.0


def compute_cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return RoPE's (cosine, sine), each [batch, length, head_dim / 2], of positions [batch, length]."""
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary position embeddings: rotate the pairs of each head by its position's angles.

    x: [batch, heads, length, head_dim]; pairs are (i, i + head_dim / 2), as weights in transformers' layout have them
    (Meta's own and GGUF files have (2i, 2i + 1)).
    """
    a, b = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


def sinusoidal_embeddings(positions: Tensor, width: int) -> Tensor:
    """Return sinusoidal position embeddings (Vaswani et al. 2017, section 3.5): [batch, length] -> [batch, length,
    hidden_size].
    """
    angles = positions[..., None].float() * torch.exp(
        torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) * (-math.log(10_000.0) / width)
    )
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


def alibi_slopes(heads: int) -> Tensor:
    """Return the ALiBi slope of each head (Press et al. 2021, arXiv:2108.12409): 2^(-8/n), 2^(-16/n) ...

    For a number of heads that is not a power of two as in the authors' code.
    """
    whole = 2 ** math.floor(math.log2(heads))
    found = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(found + between)
