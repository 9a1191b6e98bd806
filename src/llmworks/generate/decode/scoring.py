"""Shared by the engines that score given token ids: input checks, and log-probabilities from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Scored


def check_score(ids: Sequence[Sequence[int]], begins: Sequence[int], context_length: int, name: str) -> None:
    """Raise RequestError for a sequence that is too long, or has nothing to score.

    The last token is not an input, so a sequence may be one token longer than the context.
    """
    for sequence, begin in zip(ids, begins, strict=True):
        if len(sequence) > context_length + 1:
            raise RequestError(f"{len(sequence)} tokens to score, the context of {name} is {context_length}")
        if not 1 <= begin < len(sequence):
            raise RequestError(
                f"nothing to score from token {begin} of {len(sequence)}: at least one token must precede the"
                " scored ones"
            )


def score_logits(logits: Any, ids: Sequence[int], begin: int) -> Scored:
    """Compute log-probabilities of tokens from `begin` on, given logits [at least len(ids) - 1, vocabulary].

    Row i of the logits predicts token i + 1.
    """
    import numpy as np

    rows = np.asarray(logits[begin - 1 : len(ids) - 1], dtype=np.float64)
    token_logits = rows[np.arange(len(rows)), list(ids[begin:])]
    highest = rows.max(axis=1)
    logprobs = token_logits - highest - np.log(np.exp(rows - highest[:, None]).sum(axis=1))
    return Scored(tuple(float(c) for c in logprobs), bool((token_logits >= highest).all()))
