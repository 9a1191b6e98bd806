"""ROUGE (Lin 2004): similarity of two texts by shared n-grams or longest common subsequence. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, bit-parallel (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & where.get(word, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure of two word sequences, from 0 to 1."""
    return 2 * lcs_length(a, b) / (len(a) + len(b)) if a and b else 0.0


def rouge_n(a: Sequence[str], b: Sequence[str], n: int) -> float:
    """Return the ROUGE-N F-measure of two word sequences, from 0 to 1."""
    one, other = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (a, b))
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0
