"""How a Transformer knows the order of tokens: rotary angles and their stretching, sinusoids, and ALiBi's slopes.

Pure functions of positions; knows no attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmworks.model.shape import Rope


def frequencies(rope: Rope, width: int, context: int) -> tuple[Tensor, float]:
    """(angle that each pair of a head turns by per position [width / 2], factor of cosine and sine) of rotary
    positions.

    linear: position interpolation (Chen et al. 2023, arXiv:2306.15595). ntk: the base grown so that the longest wave is
    stretched by `factor` and the shortest kept. yarn: Peng et al. 2023 (arXiv:2309.00071), section 3: waves that turn
    more than `fast` times within the trained context are kept, those of less than `slow` divided by `factor`, a ramp
    between; and attention is made sharper by 0.1 ln(factor) + 1. llama-3: Llama 3.1's.
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
    )  # pairs that turn so often
    first, last = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    share = ((torch.arange(width // 2, dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0, 1)
    return kept * (1 - share) + divided * share, 0.1 * math.log(rope.factor) + 1.0


def rotation(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cosine, sine), each [batch, length, width / 2], of positions [batch, length]."""
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs of each head by its position's angles.

    x: [batch, heads, length, width]; pairs are (i, i + width / 2), as weights in transformers' layout have them (Meta's
    own and GGUF files have (2i, 2i + 1)).
    """
    a, b = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of rising wavelengths (Vaswani et al. 2017, section 3.5): [batch, length] -> [batch, length,
    width].
    """
    angles = positions[..., None].float() * torch.exp(
        torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) * (-math.log(10_000.0) / width)
    )
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


def slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2021, arXiv:2108.12409): 2^(-8/n), 2^(-16/n) ...; of a number that is no
    power of two as in the authors' code.
    """
    whole = 2 ** math.floor(math.log2(heads))
    found = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(found + between)
