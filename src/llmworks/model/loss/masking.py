"""What a model is asked to guess: the next token, hidden tokens, or hidden spans.

Pure functions of ids; the next token needs none. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import DataError
from llmworks.model.loss.linear_cross_entropy import IGNORED


def hide_tokens(
    ids: Tensor,
    mask_id: int,
    vocabulary: int,
    *,
    share: float = 0.15,
    keep: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids with some hidden, labels that are IGNORED elsewhere), for masked language modelling (Devlin et al. 2019,
    section 3.1).

    Of the chosen `share` 80 % become the mask, 10 % any token by chance, 10 % stay. ids: [batch, length]; `keep`: ids
    that are never chosen.
    """
    draw = torch.rand(ids.shape, generator=generator)
    allowed = ~torch.isin(ids, torch.tensor(list(keep), dtype=ids.dtype))
    chosen = allowed & (draw < share)
    labels = torch.where(chosen, ids, torch.full_like(ids, IGNORED))
    how = draw / share  # evenly from 0 to 1 where a token was chosen
    other = torch.randint(0, vocabulary, ids.shape, generator=generator, dtype=ids.dtype)
    hidden = torch.where(chosen & (how < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (how >= 0.8) & (how < 0.9), other, hidden), labels


def hide_spans(
    ids: Sequence[int],
    sentinels: Sequence[int],
    end: int,
    *,
    share: float = 0.15,
    mean: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """(text with spans hidden behind sentinels, the sentinels with what they hide), both ended, for span corruption
    (T5, Raffel et al. 2020, section 3.1.4).

    T5 closes the target with one more sentinel; here it is the end alone. Errors: DataError for less than two tokens,
    or no sentinel.

    About `share` of the tokens are hidden in spans of `mean` tokens on average; as many spans as there are sentinels at
    most, and some text between two.
    """
    if len(ids) < 2 or not sentinels:
        raise DataError(
            f"spans are hidden in texts of two tokens or more, behind sentinels; there are {len(ids)} tokens and"
            f" {len(sentinels)} sentinels"
        )
    hidden = min(max(round(len(ids) * share), 1), len(ids) - 1)
    spans = min(max(round(hidden / mean), 1), hidden, len(ids) - hidden, len(sentinels))
    inside, outside = _parts(hidden, spans, generator), _parts(len(ids) - hidden, spans, generator)
    source: list[int] = []
    target: list[int] = []
    at = 0
    for sentinel, shown, covered in zip(sentinels, outside, inside, strict=False):
        source += [*ids[at : at + shown], sentinel]
        target += [sentinel, *ids[at + shown : at + shown + covered]]
        at += shown + covered
    return [*source, end], [*target, end]


def _parts(total: int, count: int, generator: torch.Generator | None) -> list[int]:
    """`total` divided at random into `count` parts of at least one."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
