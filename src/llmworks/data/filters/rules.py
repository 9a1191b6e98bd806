"""What every rule set shares: a judgement of a batch of texts, and how the values it looked at are counted for a
histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmworks.data.filters.words import Array

BINS = 40


@dataclass(frozen=True)
class Bound:
    """One rule: texts whose `value` is below `low` or above `high` are dropped for `reason`; None is no bound.

    `top` is where the histogram ends; what lies beyond is counted in its last bin.
    """

    reason: str
    label: str
    value: Array
    top: float
    low: float | None = None
    high: float | None = None

    def fails(self) -> Array:
        """Which texts break the rule."""
        broken = np.zeros(len(self.value), dtype=bool)
        if self.low is not None:
            broken |= self.value < self.low
        if self.high is not None:
            broken |= self.value > self.high
        return broken


@dataclass
class Judgement:
    """The first broken rule of each text ("" for none), and the histogram of every rule's values."""

    reasons: list[str]
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)


def judge(count: int, bounds: Sequence[Bound]) -> Judgement:
    """Apply rules in their order to `count` texts."""
    reasons = np.full(count, "", dtype=object)
    histograms: dict[str, dict[str, Any]] = {}
    for bound in bounds:
        reasons[(reasons == "") & bound.fails()] = bound.reason
        histogram = histograms.setdefault(
            bound.label, {"counts": [0] * BINS, "top": bound.top, "low": None, "high": None}
        )
        if not any(histogram["counts"]):
            places = np.clip(np.nan_to_num(bound.value) / bound.top * BINS, 0, BINS - 1).astype(int)
            histogram["counts"] = np.bincount(places, minlength=BINS).tolist()
        histogram["low"] = bound.low if bound.low is not None else histogram["low"]
        histogram["high"] = bound.high if bound.high is not None else histogram["high"]
    return Judgement(reasons.tolist(), histograms)


def share(part: Array, whole: Array) -> Array:
    """`part / whole`, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)
