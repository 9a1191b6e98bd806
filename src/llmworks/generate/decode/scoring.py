"""What engines that score given text have in common: what can be asked, and how logits become scores.

Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Scored


def check_score(ids: Sequence[Sequence[int]], begins: Sequence[int], longest: int, name: str) -> None:
    """RequestError for a sequence that is too long, or that has nothing to score.

    The last token is not read, so a text may be one longer.
    """
    for sequence, begin in zip(ids, begins, strict=True):
        if len(sequence) > longest + 1:
            raise RequestError(f"{len(sequence)} tokens to score, {name} reads {longest} at most")
        if not 1 <= begin < len(sequence):
            raise RequestError(
                f"nothing to score from token {begin} of {len(sequence)}: at least one token must stand before what is"
                " scored"
            )


def scored(logits: Any, ids: Sequence[int], begin: int) -> Scored:
    """Score tokens from `begin` on by the logits [at least len(ids) - 1, vocabulary] after each token before."""
    import numpy as np

    rows = np.asarray(logits[begin - 1 : len(ids) - 1], dtype=np.float64)
    given = rows[np.arange(len(rows)), list(ids[begin:])]
    highest = rows.max(axis=1)
    chances = given - highest - np.log(np.exp(rows - highest[:, None]).sum(axis=1))
    return Scored(tuple(float(c) for c in chances), bool((given >= highest).all()))
