"""Inter-judge agreement and judge biases. Pure functions on verdicts.

Kappa: Cohen 1960; several raters: Fleiss 1971. Position and length (verbosity) bias of judges: Zheng et al. 2023
(arXiv:2306.05685), section 3.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence


def kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Compute Cohen's kappa of two raters' labels of the same items: 1 is full agreement, 0 chance agreement.

    NaN where both raters use a single, identical label.
    """
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    left, right = Counter(a), Counter(b)
    chance = sum(left[label] * right[label] for label in left) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def weighted_kappa(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute quadratic-weighted kappa for grades: disagreements are weighted by their square (Cohen 1968).

    NaN where all grades are the same.
    """
    n = len(a)
    observed = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / n
    left, right = Counter(a), Counter(b)
    chance = sum(left[x] * right[y] * (x - y) ** 2 for x in left for y in right) / n**2
    return 1 - observed / chance if chance else float("nan")


def merge_verdicts(first: str, swapped: str) -> str:
    """Merge the verdicts of both answer orders into "A", "B" or "C" (tie); a verdict that changes with the order is a
    tie.

    `first`, `swapped`: verdicts with A shown first and with B shown first, both in terms of A and B.
    """
    return first if first == swapped else "C"


def position_bias(firsts: Sequence[str], swapped: Sequence[str]) -> Mapping[str, float]:
    """Return shares of pairs: `consistent` in both orders; `prefers_first`, `prefers_second`: position bias, where the
    answer in that position won in both orders.
    """
    n = max(1, len(firsts))
    first = sum(x == "A" and y == "B" for x, y in zip(firsts, swapped, strict=True))
    second = sum(x == "B" and y == "A" for x, y in zip(firsts, swapped, strict=True))
    same = sum(x == y for x, y in zip(firsts, swapped, strict=True))
    return {"consistent": same / n, "prefers_first": first / n, "prefers_second": second / n}


def length_bias(verdicts: Sequence[str], lengths: Sequence[tuple[int, int]]) -> tuple[float, int]:
    """Return (share of decided pairs of unequal length won by the longer answer, number of such pairs)."""
    decided = [(v, a, b) for v, (a, b) in zip(verdicts, lengths, strict=True) if v in ("A", "B") and a != b]
    return (sum((v == "A") == (a > b) for v, a, b in decided) / len(decided) if decided else float("nan")), len(decided)


def majority_vote(votes: Sequence[str]) -> str:
    """Return the majority verdict; "C" (tie) where there is none."""
    counted = Counter(votes).most_common(2)
    return counted[0][0] if len(counted) == 1 or counted[0][1] > counted[1][1] else "C"
