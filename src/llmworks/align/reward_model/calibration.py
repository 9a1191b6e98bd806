"""Calibration of predicted probabilities: bins, expected calibration error, and Wilson intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BINS = 10


class Bin(NamedTuple):
    """Cases with a predicted probability between `low` and `high`: mean prediction, share of true ones, and count."""

    low: float
    high: float
    said: float
    true: float
    cases: int


def bins_of(
    chances: Sequence[float], true: Sequence[bool], *, low: float = 0.0, high: float = 1.0, bins: int = BINS
) -> list[Bin]:
    """Return the non-empty bins of equal width."""
    found: list[Bin] = []
    for number in range(bins):
        begin, end = low + (high - low) * number / bins, low + (high - low) * (number + 1) / bins
        inside = [
            (chance, came)
            for chance, came in zip(chances, true, strict=True)
            if begin <= chance < end or (number == bins - 1 and chance == end)
        ]
        if inside:
            found.append(
                Bin(
                    begin,
                    end,
                    sum(chance for chance, _ in inside) / len(inside),
                    sum(came for _, came in inside) / len(inside),
                    len(inside),
                )
            )
    return found


def expected_error(found: Sequence[Bin]) -> float:
    """Return the expected calibration error (ECE, Naeini et al. 2015): the mean gap of prediction and outcome.

    Bins are weighted by their cases.
    """
    total = sum(b.cases for b in found)
    return sum(b.cases * abs(b.said - b.true) for b in found) / total if total else 0.0


def wilson(right: float, total: int, z: float = 1.959964) -> tuple[float, float, float]:
    """Return (share, low, high): a share with its 95% interval (Wilson 1927). A tie may count as half a case."""
    share, spread = (
        right / total,
        z * math.sqrt(right / total * (1 - right / total) / total + z * z / (4 * total * total)),
    )
    middle, scale = share + z * z / (2 * total), 1 + z * z / total
    return share, (middle - spread) / scale, (middle + spread) / scale
