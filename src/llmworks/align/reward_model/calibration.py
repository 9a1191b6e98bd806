"""Calibration of predicted probabilities: bins, expected calibration error, and Wilson intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BINS = 10


class CalibrationBin(NamedTuple):
    """Cases with a predicted probability between `low` and `high`: mean prediction, share of true ones, and count."""

    low: float
    high: float
    predicted: float
    observed: float
    size: int


def compute_bins(
    probabilities: Sequence[float],
    outcomes: Sequence[bool],
    *,
    low: float = 0.0,
    high: float = 1.0,
    num_bins: int = BINS,
) -> list[CalibrationBin]:
    """Return the non-empty bins of equal width."""
    found: list[CalibrationBin] = []
    for number in range(num_bins):
        begin, end = low + (high - low) * number / num_bins, low + (high - low) * (number + 1) / num_bins
        inside = [
            (probability, outcome)
            for probability, outcome in zip(probabilities, outcomes, strict=True)
            if begin <= probability < end or (number == num_bins - 1 and probability == end)
        ]
        if inside:
            found.append(
                CalibrationBin(
                    begin,
                    end,
                    sum(chance for chance, _ in inside) / len(inside),
                    sum(came for _, came in inside) / len(inside),
                    len(inside),
                )
            )
    return found


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (ECE, Naeini et al. 2015): the mean gap of prediction and outcome.

    Bins are weighted by their cases.
    """
    total = sum(b.size for b in bins)
    return sum(b.size * abs(b.predicted - b.observed) for b in bins) / total if total else 0.0


def wilson_interval(successes: float, total: int, z: float = 1.959964) -> tuple[float, float, float]:
    """Return (share, low, high): a share with its 95% interval (Wilson 1927). A tie may count as half a case."""
    share, spread = (
        successes / total,
        z * math.sqrt(successes / total * (1 - successes / total) / total + z * z / (4 * total * total)),
    )
    middle, scale = share + z * z / (2 * total), 1 + z * z / total
    return share, (middle - spread) / scale, (middle + spread) / scale
