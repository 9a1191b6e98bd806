"""How far judges agree, and what sways them. Pure functions on verdicts.

Kappa: Cohen 1960; several raters: Fleiss 1971. Position and length bias of judges: Zheng et al. 2023
(arXiv:2306.05685), section 3.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence


def kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Cohen's kappa of two raters' labels of the same items: 1 is full agreement, 0 that of chance.

    NaN where both only ever say one and the same.
    """
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    left, right = Counter(a), Counter(b)
    chance = sum(left[label] * right[label] for label in left) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def weighted_kappa(a: Sequence[float], b: Sequence[float]) -> float:
    """Cohen's kappa for grades: a disagreement weighs as the square of its size (Cohen 1968).

    NaN where all grades are the same.
    """
    n = len(a)
    observed = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / n
    left, right = Counter(a), Counter(b)
    chance = sum(left[x] * right[y] * (x - y) ** 2 for x in left for y in right) / n**2
    return 1 - observed / chance if chance else float("nan")


def merged(first: str, swapped: str) -> str:
    """One verdict of two, the answers being shown in both orders: "A", "B" or "C" for a tie; a judge that changes with
    the order has none: a tie.

    `first`, `swapped`: what was said of A before B, and of B before A, both in terms of A and B.
    """
    return first if first == swapped else "C"


def position(firsts: Sequence[str], swapped: Sequence[str]) -> Mapping[str, float]:
    """Shares of pairs: `consistent` in both orders; `prefers_first`, `prefers_second`: of the others, won by whichever
    stood there.
    """
    n = max(1, len(firsts))
    first = sum(x == "A" and y == "B" for x, y in zip(firsts, swapped, strict=True))
    second = sum(x == "B" and y == "A" for x, y in zip(firsts, swapped, strict=True))
    same = sum(x == y for x, y in zip(firsts, swapped, strict=True))
    return {"consistent": same / n, "prefers_first": first / n, "prefers_second": second / n}


def length(verdicts: Sequence[str], lengths: Sequence[tuple[int, int]]) -> tuple[float, int]:
    """(share of decided pairs of unequal length that the longer answer won, how many there are)."""
    decided = [(v, a, b) for v, (a, b) in zip(verdicts, lengths, strict=True) if v in ("A", "B") and a != b]
    return (sum((v == "A") == (a > b) for v, a, b in decided) / len(decided) if decided else float("nan")), len(decided)


def majority(votes: Sequence[str]) -> str:
    """What most say; a tie where nobody has the most."""
    counted = Counter(votes).most_common(2)
    return counted[0][0] if len(counted) == 1 or counted[0][1] > counted[1][1] else "C"
