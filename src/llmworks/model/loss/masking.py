"""Corrupt token ids for masked language modeling (BERT) and span corruption (T5). Pure functions of ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import DataError
from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX


def mask_tokens(
    ids: Tensor,
    mask_id: int,
    vocabulary: int,
    *,
    mlm_probability: float = 0.15,
    excluded_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask tokens for masked language modeling (Devlin et al. 2019, section 3.1).

    Returns (masked ids, labels that are IGNORE_INDEX elsewhere). Of the `mlm_probability` selected tokens 80 % become
    the mask token, 10 % a random token, 10 % stay. ids: [batch, length]; `excluded_ids`: ids that are never selected.
    """
    draw = torch.rand(ids.shape, generator=generator)
    allowed = ~torch.isin(ids, torch.tensor(list(excluded_ids), dtype=ids.dtype))
    chosen = allowed & (draw < mlm_probability)
    labels = torch.where(chosen, ids, torch.full_like(ids, IGNORE_INDEX))
    how = draw / mlm_probability  # uniform in 0 to 1 where a token was selected
    other = torch.randint(0, vocabulary, ids.shape, generator=generator, dtype=ids.dtype)
    masked = torch.where(chosen & (how < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (how >= 0.8) & (how < 0.9), other, masked), labels


def corrupt_spans(
    ids: Sequence[int],
    sentinels: Sequence[int],
    end: int,
    *,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Corrupt spans as T5 (Raffel et al. 2020, section 3.1.4).

    Returns (ids with spans replaced by sentinels, sentinels each followed by its span), both with an end token. T5
    closes the target with one more sentinel; here it is the end token alone.

    About `noise_density` of the tokens are masked in spans of `mean_span_length` tokens on average; at most as many
    spans as sentinels, with unmasked tokens between two spans. Errors: DataError for fewer than two tokens, or no
    sentinel.
    """
    if len(ids) < 2 or not sentinels:
        raise DataError(
            f"span corruption needs at least two tokens and one sentinel; got {len(ids)} tokens and {len(sentinels)}"
            " sentinels"
        )
    num_noise_tokens = min(max(round(len(ids) * noise_density), 1), len(ids) - 1)
    spans = min(
        max(round(num_noise_tokens / mean_span_length), 1),
        num_noise_tokens,
        len(ids) - num_noise_tokens,
        len(sentinels),
    )
    inside, outside = (
        _split_randomly(num_noise_tokens, spans, generator),
        _split_randomly(len(ids) - num_noise_tokens, spans, generator),
    )
    source: list[int] = []
    target: list[int] = []
    at = 0
    for sentinel, shown, covered in zip(sentinels, outside, inside, strict=False):
        source += [*ids[at : at + shown], sentinel]
        target += [sentinel, *ids[at + shown : at + shown + covered]]
        at += shown + covered
    return [*source, end], [*target, end]


def _split_randomly(total: int, count: int, generator: torch.Generator | None) -> list[int]:
    """Split `total` at random into `count` parts of at least one."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
