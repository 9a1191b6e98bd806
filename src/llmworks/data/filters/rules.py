"""Shared code of the filters: threshold rules over a batch of texts, and histograms of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmworks.data.filters.words import Array

BINS = 40


@dataclass(frozen=True)
class ThresholdRule:
    """A threshold rule: texts whose `value` is below `low` or above `high` are dropped for `reason` (None = no bound).

    `top` is the upper end of the histogram; larger values are counted in its last bin.
    """

    reason: str
    label: str
    value: Array
    top: float
    low: float | None = None
    high: float | None = None

    def find_failures(self) -> Array:
        """Return a boolean mask of the texts that break the rule."""
        broken = np.zeros(len(self.value), dtype=bool)
        if self.low is not None:
            broken |= self.value < self.low
        if self.high is not None:
            broken |= self.value > self.high
        return broken


@dataclass
class FilterDecisions:
    """Filter decisions: the first broken rule of each text ("" = none), and a histogram of every rule's values."""

    reasons: list[str]
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)


def apply_rules(count: int, rules: Sequence[ThresholdRule]) -> FilterDecisions:
    """Apply rules in order to `count` texts."""
    reasons = np.full(count, "", dtype=object)
    histograms: dict[str, dict[str, Any]] = {}
    for bound in rules:
        reasons[(reasons == "") & bound.find_failures()] = bound.reason
        histogram = histograms.setdefault(
            bound.label, {"counts": [0] * BINS, "top": bound.top, "low": None, "high": None}
        )
        if not any(histogram["counts"]):
            places = np.clip(np.nan_to_num(bound.value) / bound.top * BINS, 0, BINS - 1).astype(int)
            histogram["counts"] = np.bincount(places, minlength=BINS).tolist()
        histogram["low"] = bound.low if bound.low is not None else histogram["low"]
        histogram["high"] = bound.high if bound.high is not None else histogram["high"]
    return FilterDecisions(reasons.tolist(), histograms)


def safe_ratio(part: Array, whole: Array) -> Array:
    """Compute `part / whole`, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0)
