"""Confidence intervals and paired tests by resampling, over per-sample scores. Pure functions on numbers.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16; Koehn 2004 for the paired form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% percentile interval."""

    value: float
    low: float
    high: float


def resampled_means(data: Any, seed: int, resamples: int) -> Any:
    """Means of `resamples` draws with replacement from `data` [n]; a few draws at a time, so memory stays small."""
    import numpy as np

    rng, n = np.random.default_rng(seed), len(data)
    at_once = max(1, 4_000_000 // n)
    parts = [data[rng.integers(0, n, (min(at_once, resamples - done), n))].mean(axis=1) for done in range(0, resamples, at_once)]
    return np.concatenate(parts)


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of per-sample scores and its 95% bootstrap interval."""
    import numpy as np

    data = np.asarray(values, dtype=float)
    drawn = resampled_means(data, seed, resamples)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


@dataclass(frozen=True)
class Paired:
    """The mean difference b - a over paired samples, its 95% interval, and how often resampling finds it on the other side of zero."""

    difference: Interval
    p_not_better: float
    p_not_worse: float


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """Paired bootstrap of b - a: samples are drawn together. p_not_better is the share of resamples with a difference <= 0."""
    import numpy as np

    delta = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    drawn = resampled_means(delta, seed, resamples)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Paired(Interval(float(delta.mean()), float(low), float(high)), float((drawn <= 0).mean()), float((drawn >= 0).mean()))
