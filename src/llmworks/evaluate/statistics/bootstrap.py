"""Confidence intervals and paired tests by resampling. Pure functions on numbers.

A metric's value is a function of sums over samples, so a resample is a weighted sum: samples are drawn with
replacement, or whole groups of them where rows belong together (the clustered bootstrap). Source: Efron & Tibshirani,
An Introduction to the Bootstrap (1993), chapters 13 and 16; Davison & Hinkley 1997, section 3.8 for groups; Koehn 2004
for the paired form; Hesterberg 2015 (arXiv:1411.5279), section 5.3 for small samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES, DRAWS = 10_000, 20_000_000  # draws of samples in all: many samples need fewer resamples
Value = Callable[[Any], Any]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def grouped(numbers: Any, groups: Sequence[str]) -> Any:
    """Rows [samples, k] summed by group: [groups, k]. Without groups (empty names) every row is its own."""
    import numpy as np

    data = np.asarray(numbers, dtype=float)
    if not groups or not any(groups):
        return data
    own = [name or (number,) for number, name in enumerate(groups)]  # a row without a group is its own
    names = {name: place for place, name in enumerate(dict.fromkeys(own))}
    out = np.zeros((len(names), data.shape[1]))
    np.add.at(out, [names[name] for name in own], data)
    return out


def resampled(numbers: Any, seed: int, resamples: int) -> Any:
    """Sums [resamples, k] over draws with replacement of the rows of `numbers` [n, k]; a few draws at a time, so memory
    stays small.
    """
    import numpy as np

    rng, n = np.random.default_rng(seed), len(numbers)
    at_once = max(1, 4_000_000 // n)
    parts = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - done)) @ numbers
        for done in range(0, resamples, at_once)
    ]
    return np.concatenate(parts)


def tails(n: int) -> tuple[float, float]:
    """Percentiles of a 95% interval, widened for n draws as Student's t is against the normal (the expanded percentile
    interval).
    """
    from statistics import NormalDist

    if n < 2:
        return 0.0, 100.0
    low = NormalDist().cdf(-student(n - 1) * (n / (n - 1)) ** 0.5)
    return 100 * low, 100 * (1 - low)


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t (Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5; exact for 1 and 2
    degrees).
    """
    if degrees == 1:
        return 12.706204736432095
    if degrees == 2:
        return 4.302652729911275
    z, v = 1.959963984540054, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def interval(
    numbers: Any, value: Value, *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """A metric over samples with its 95% interval.

    `numbers` [samples, k] are summed over samples (and groups), `value` is of the sums.
    """
    import numpy as np

    data = grouped(numbers, groups)
    drawn = value(resampled(data, seed, min(resamples, max(1000, DRAWS // len(data)))))
    low, high = np.nanpercentile(drawn, tails(len(data)))
    return Interval(float(value(data.sum(axis=0))), float(low), float(high))


def mean_interval(
    values: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean of per-sample scores and its 95% interval."""
    return interval(
        [(v, 1.0) for v in values],
        lambda sums: sums[..., 0] / sums[..., 1],
        groups=groups,
        seed=seed,
        resamples=resamples,
    )


@dataclass(frozen=True)
class Paired:
    """The mean difference b - a over paired samples, its 95% interval, and how often resampling finds it on the other
    side of zero.
    """

    difference: Interval
    p_not_better: float
    p_not_worse: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """Paired bootstrap of b - a: samples are drawn together.

    p_not_better is the share of resamples with a difference <= 0.
    """
    import numpy as np

    delta = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    data = grouped(np.stack([delta, np.ones_like(delta)], axis=1), groups)
    drawn = resampled(data, seed, resamples)
    drawn = drawn[:, 0] / drawn[:, 1]
    low, high = np.percentile(drawn, tails(len(data)))
    return Paired(
        Interval(float(delta.mean()), float(low), float(high)), float((drawn <= 0).mean()), float((drawn >= 0).mean())
    )


def certain(found: Interval, draws: int) -> Interval:
    """An interval of a share that is 0 or 1 in all draws, which resampling gives no width: the exact binomial one
    (Clopper & Pearson 1934).
    """
    if found.low == found.high == found.value and found.value in (0.0, 1.0) and draws:
        reach = 0.025 ** (1 / draws)
        return Interval(found.value, reach, 1.0) if found.value else Interval(found.value, 0.0, 1 - reach)
    return found


def sign_flip(
    a: Sequence[float], b: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, flips: int = 10_000
) -> float:
    """Two-sided p of b - a: how often the differences, each with a sign drawn anew, sum up to as much (Fisher's
    randomization test; groups keep one sign).

    Exact up to twelve differences that are not zero; else by drawing, and then never below 1 / flips.
    """
    import itertools

    import numpy as np

    delta = grouped(np.stack([np.asarray(b, dtype=float) - np.asarray(a, dtype=float)], axis=1), groups)[:, 0]
    delta = delta[np.abs(delta) > 1e-12]
    if not len(delta):
        return 1.0
    seen = abs(float(delta.sum())) - 1e-9
    if len(delta) <= 12:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(delta))))
        return float((np.abs(signs @ delta) >= seen).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(delta)))
    return float((1 + (np.abs(signs @ delta) >= seen).sum()) / (1 + flips))


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of several tests, made larger so that one in twenty families of tests errs at 5% (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda i: chances[i])
    out, highest = [0.0] * len(chances), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[i]))
        out[i] = highest
    return out


def detectable(spread: float, samples: int) -> float:
    """The smallest difference that a two-sided test at 5% finds in 80% of runs, for per-sample scores of such a
    standard deviation.

    Source: (1.96 + 0.84) * sd / sqrt(n), Cohen 1988, chapter 2; for two independent runs of n samples each the spread
    is sqrt(2) * sd.
    """
    return float((1.959963984540054 + 0.8416212335729143) * spread / max(1, samples) ** 0.5)
