"""Count n-grams for Kneser-Ney smoothing: frequencies, and continuation counts for the lower orders. Torch-free.

Kneser & Ney 1995; modified, with three discounts, by Chen & Goodman 1998 (TR-10-98, section 3); counts as in KenLM's
lmplz (Heafield et al. 2013). Each document begins with a begin-of-sequence symbol, whose id is the vocabulary size and
which is never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # discounts for a corpus too small to estimate them (lmplz --discount_fallback)


@dataclass(frozen=True)
class NgramOrder:
    """All n-grams of one length, numbered in the order of `keys`.

    A key is (number of the n-gram's first n - 1 tokens in the order below) * (vocab_size + 1) + (its last token); keys
    are sorted. `counts`: frequencies for the highest order, else continuation counts: the number of different tokens
    before it (at the beginning of a document: its frequency).
    """

    keys: Any  # int64 [n-grams]
    counts: Any  # int64 [n-grams]


def count_ngrams(tokens: Any, begins: Any, vocabulary: int, highest: int) -> list[NgramOrder]:
    """Count the n-grams of every length up to `highest`.

    tokens: ids of all documents concatenated; begins: index of each document's first token.

    Holds all tokens in memory, about 60 bytes per token.
    """
    base = vocabulary + 1
    ids = np.insert(np.asarray(tokens, dtype=np.int64), begins, vocabulary)
    marks = np.asarray(begins) + np.arange(len(begins))
    offsets = np.arange(len(ids)) - np.repeat(marks, np.diff([*marks, len(ids)]))  # index in the document
    number = ids  # number of the n-gram that ends at each token
    below = NgramOrder(np.arange(base, dtype=np.int64), np.bincount(ids, minlength=base))
    orders: list[NgramOrder] = []
    for n in range(2, highest + 1):
        places = np.flatnonzero(offsets >= n - 1)
        keys, first, numbers, counts = np.unique(
            number[places - 1] * base + ids[places], return_index=True, return_inverse=True, return_counts=True
        )
        continuation_counts = np.bincount(
            number[places[first]], minlength=len(below.keys)
        )  # continuation counts: n-grams that end with each shorter one
        orders.append(
            NgramOrder(below.keys, np.where(continuation_counts > 0, continuation_counts, below.counts))
        )  # none: it begins a document
        below = NgramOrder(keys, counts)
        number = np.full(len(ids), -1)
        number[places] = numbers
    orders.append(below)
    orders[0].counts[vocabulary] = 0
    return orders


def estimate_discounts(counts: Any) -> tuple[tuple[float, float, float], bool]:
    """Estimate one order's discounts of counts one, two, and more (Chen & Goodman 1998, equation 26).

    Returns (discounts, whether the fallback was used).
    """
    one, two, three, four = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (one and two and three and four):
        return FALLBACK_DISCOUNTS, True
    share = one / (one + 2 * two)
    found = (1 - 2 * share * two / one, 2 - 3 * share * three / two, 3 - 4 * share * four / three)
    if any(not 0 <= value <= n for n, value in enumerate(found, 1)):
        return FALLBACK_DISCOUNTS, True
    return found, False


def estimate_all_discounts(orders: Sequence[NgramOrder]) -> tuple[list[tuple[float, float, float]], list[int]]:
    """Return (discounts of every order, the orders whose corpus was too small, which use the fallback)."""
    found = [estimate_discounts(order.counts) for order in orders]
    return [values for values, _ in found], [n for n, (_, fallen) in enumerate(found, 1) if fallen]
