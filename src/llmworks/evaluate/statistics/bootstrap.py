"""Bootstrap confidence intervals and paired tests. Pure functions on numbers.

A metric's value is a function of sums over samples, so a resample is a weighted sum: samples are drawn with
replacement, or whole groups of them where rows belong together (clustered bootstrap). Source: Efron & Tibshirani,
An Introduction to the Bootstrap (1993), chapters 13 and 16; Davison & Hinkley 1997, section 3.8 for groups; Koehn 2004
for the paired form; Hesterberg 2015 (arXiv:1411.5279), section 5.3 for small samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES, MAX_DRAWS = 10_000, 20_000_000  # cap on draws in total: many samples need fewer resamples
Value = Callable[[Any], Any]


@dataclass(frozen=True)
class MetricInterval:
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


def sum_by_group(numbers: Any, groups: Sequence[str]) -> Any:
    """Sum rows [samples, k] by group: [groups, k]. A row without a group (empty name) is its own."""
    import numpy as np

    data = np.asarray(numbers, dtype=float)
    if not groups or not any(groups):
        return data
    own = [name or (number,) for number, name in enumerate(groups)]  # a row without a group is its own group
    names = {name: place for place, name in enumerate(dict.fromkeys(own))}
    out = np.zeros((len(names), data.shape[1]))
    np.add.at(out, [names[name] for name in own], data)
    return out


def bootstrap_sums(numbers: Any, seed: int, resamples: int) -> Any:
    """Compute sums [resamples, k] over draws with replacement of the rows of `numbers` [n, k], in batches to bound
    memory.
    """
    import numpy as np

    rng, n = np.random.default_rng(seed), len(numbers)
    at_once = max(1, 4_000_000 // n)
    parts = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - done)) @ numbers
        for done in range(0, resamples, at_once)
    ]
    return np.concatenate(parts)


def compute_expanded_percentiles(n: int) -> tuple[float, float]:
    """Return the percentiles of a 95% interval, widened for n draws by Student's t relative to the normal (expanded
    percentile interval).
    """
    from statistics import NormalDist

    if n < 2:
        return 0.0, 100.0
    low = NormalDist().cdf(-t_quantile(n - 1) * (n / (n - 1)) ** 0.5)
    return 100 * low, 100 * (1 - low)


def t_quantile(degrees: int) -> float:
    """Compute the 97.5% quantile of Student's t (Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5; exact for 1 and
    2 degrees of freedom).
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


def bootstrap_interval(
    numbers: Any, value: Value, *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> MetricInterval:
    """Compute a metric over samples with its 95% bootstrap interval.

    `numbers` [samples, k] are summed over samples (and groups); `value` maps the sums to the metric.
    """
    import numpy as np

    data = sum_by_group(numbers, groups)
    resampled_values = value(bootstrap_sums(data, seed, min(resamples, max(1000, MAX_DRAWS // len(data)))))
    low, high = np.nanpercentile(resampled_values, compute_expanded_percentiles(len(data)))
    return MetricInterval(float(value(data.sum(axis=0))), float(low), float(high))


def mean_interval(
    values: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> MetricInterval:
    """Compute the mean of per-sample scores and its 95% interval."""
    return bootstrap_interval(
        [(v, 1.0) for v in values],
        lambda sums: sums[..., 0] / sums[..., 1],
        groups=groups,
        seed=seed,
        resamples=resamples,
    )


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference b - a over paired samples, its 95% interval, and the shares of resamples on either side of
    zero.
    """

    difference: MetricInterval
    p_not_better: float
    p_not_worse: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compute the paired bootstrap of b - a: paired samples are drawn together.

    p_not_better is the share of resamples with a difference <= 0.
    """
    import numpy as np

    delta = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    data = sum_by_group(np.stack([delta, np.ones_like(delta)], axis=1), groups)
    drawn = bootstrap_sums(data, seed, resamples)
    drawn = drawn[:, 0] / drawn[:, 1]
    low, high = np.percentile(drawn, compute_expanded_percentiles(len(data)))
    return PairedDifference(
        MetricInterval(float(delta.mean()), float(low), float(high)),
        float((drawn <= 0).mean()),
        float((drawn >= 0).mean()),
    )


def exact_interval(interval: MetricInterval, draws: int) -> MetricInterval:
    """Replace the zero-width bootstrap interval of a share that is 0 or 1 in all draws by the exact binomial interval
    (Clopper & Pearson 1934).
    """
    if interval.low == interval.high == interval.value and interval.value in (0.0, 1.0) and draws:
        reach = 0.025 ** (1 / draws)
        return (
            MetricInterval(interval.value, reach, 1.0)
            if interval.value
            else MetricInterval(interval.value, 0.0, 1 - reach)
        )
    return interval


def sign_flip(
    a: Sequence[float], b: Sequence[float], *, groups: Sequence[str] = (), seed: int = 0, flips: int = 10_000
) -> float:
    """Compute the two-sided p of b - a by a sign-flip permutation test (Fisher's randomization test): how often
    randomly signed differences sum to at least as much. Groups share one sign.

    Exact for up to twelve nonzero differences; otherwise sampled, and then never below 1 / flips.
    """
    import itertools

    import numpy as np

    delta = sum_by_group(np.stack([np.asarray(b, dtype=float) - np.asarray(a, dtype=float)], axis=1), groups)[:, 0]
    delta = delta[np.abs(delta) > 1e-12]
    if not len(delta):
        return 1.0
    observed = abs(float(delta.sum())) - 1e-9
    if len(delta) <= 12:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(delta))))
        return float((np.abs(signs @ delta) >= observed).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(delta)))
    return float((1 + (np.abs(signs @ delta) >= observed).sum()) / (1 + flips))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing, controlling the family-wise error rate (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = highest
    return out


def minimum_detectable_effect(standard_deviation: float, samples: int) -> float:
    """Compute the smallest difference that a two-sided test at 5% detects with 80% power, given the standard deviation
    of per-sample scores.

    Source: (1.96 + 0.84) * sd / sqrt(n), Cohen 1988, chapter 2; for two independent runs of n samples each,
    `standard_deviation` is sqrt(2) * sd.
    """
    return float((1.959963984540054 + 0.8416212335729143) * standard_deviation / max(1, samples) ** 0.5)
