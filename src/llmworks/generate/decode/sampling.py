"""Sample the next token: greedy, temperature, top-k, top-p (nucleus). Pure tensor functions over batched logits."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits per row, set the rest to -inf. logits: [..., vocabulary]; k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): keep the smallest set whose probability reaches p."""
    if p >= 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability mass of the more probable tokens
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, index, ordered)


def sample_token(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> int:
    """Sample one token from one row of logits [vocabulary]."""
    if temperature <= 0:
        return int(logits.argmax())
    kept = filter_top_p(filter_top_k(logits / temperature, top_k), top_p)
    return int(torch.multinomial(kept.softmax(dim=-1), 1, generator=generator))
