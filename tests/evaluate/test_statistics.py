"""Intervals and paired tests against exact results."""

from __future__ import annotations

import numpy as np
import pytest

from llmworks.evaluate.statistics.bootstrap import (
    MetricInterval,
    exact_interval,
    mean_interval,
    minimum_detectable_effect,
    paired_difference,
    sign_flip,
    t_quantile,
)


def test_interval_of_a_proportion_is_the_normal_one() -> None:
    interval = mean_interval([1.0] * 300 + [0.0] * 700)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.004)
    assert interval.high == pytest.approx(0.3 + half, abs=0.004)


@pytest.mark.parametrize(
    ("samples", "draw"),
    [(30, "half"), (30, "skewed"), (100, "tenths"), (100, "skewed"), pytest.param(300, "half", marks=pytest.mark.slow)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(samples: int, draw: str) -> None:
    """1,000 experiments each: 95% intervals hold the truth in 93% to 97%."""
    rng, size = np.random.default_rng(samples), (1000, samples)
    if draw == "skewed":
        data, truth = rng.beta(2, 4, size), 1 / 3
    else:
        data, truth = rng.binomial(1, 0.5, size) if draw == "half" else rng.integers(0, 11, size) / 10, 0.5
    hits = sum(
        found.low <= truth <= found.high
        for found in (mean_interval(list(row), seed=i, resamples=1000) for i, row in enumerate(data))
    )
    assert 930 <= hits <= 970


@pytest.mark.slow
def test_intervals_of_groups_cover_the_truth() -> None:
    """Rows of a group are alike: an interval that takes them for independent is far too narrow, the clustered one is
    not.
    """
    rng = np.random.default_rng(0)
    hits = {"clustered": 0, "plain": 0}
    for trial in range(300):
        level = rng.normal(0.5, 0.2, 40)
        values = (level[:, None] + rng.normal(0, 0.1, (40, 10))).ravel()
        names = [str(i // 10) for i in range(400)]
        for what, groups in (("clustered", names), ("plain", [])):
            found = mean_interval(list(values), groups=groups, seed=trial, resamples=1000)
            hits[what] += found.low <= 0.5 <= found.high
    assert 276 <= hits["clustered"] <= 294  # 92% to 98%: 300 experiments tell no more
    assert hits["plain"] < 200


@pytest.mark.slow
def test_paired_differences_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(1000):
        ease = rng.uniform(0.1, 0.8, 150)
        a, b = (rng.random(150) < ease).astype(float), (rng.random(150) < ease + 0.1).astype(float)
        d = paired_difference(list(a), list(b), seed=trial, resamples=1000).difference
        hits += d.low <= 0.1 <= d.high
    assert 930 <= hits <= 970


def test_a_share_that_is_certain_has_the_exact_interval() -> None:
    """Clopper and Pearson's: 8 of 8 leave 63.1% to 100%, 0 of 80 leave 0 to 4.51%."""
    assert exact_interval(MetricInterval(1.0, 1.0, 1.0), 8).low == pytest.approx(0.6306, abs=1e-4)
    assert exact_interval(MetricInterval(0.0, 0.0, 0.0), 80).high == pytest.approx(0.0451, abs=1e-4)
    assert exact_interval(MetricInterval(0.5, 0.5, 0.5), 8) == MetricInterval(0.5, 0.5, 0.5)


def test_randomization_is_the_sign_test_for_right_and_wrong() -> None:
    """Five gained, none lost: 2 / 32. Eight gained, two lost: McNemar's exact 0.109. Two groups can never tell."""
    assert sign_flip([0.0] * 8, [1.0] * 5 + [0.0] * 3) == pytest.approx(0.0625)
    assert sign_flip([0.0] * 8 + [1.0] * 2 + [1.0] * 20, [1.0] * 8 + [0.0] * 2 + [1.0] * 20) == pytest.approx(0.109375)
    assert sign_flip([0.0] * 12, [1.0] * 12, groups=["a"] * 6 + ["b"] * 6) == pytest.approx(0.5)
    assert sign_flip([1.0] * 5, [1.0] * 5) == 1.0
    rng = np.random.default_rng(4)
    below = sum(sign_flip(list(rng.random(40)), list(rng.random(40)), seed=i, flips=500) < 0.05 for i in range(400))
    assert 8 <= below <= 34  # 5% of 400


def test_students_quantiles() -> None:
    """Tables of the t distribution, 97.5%."""
    for degrees, quantile in (
        (1, 12.706),
        (2, 4.303),
        (5, 2.571),
        (10, 2.228),
        (30, 2.042),
        (100, 1.984),
        (1000, 1.962),
    ):
        assert t_quantile(degrees) == pytest.approx(quantile, abs=4e-3 if degrees > 2 else 1e-3)


def test_the_detectable_difference_is_found_in_four_of_five_runs() -> None:
    rng, n = np.random.default_rng(2), 200
    gap = minimum_detectable_effect(0.5, n)
    found = 0
    for _ in range(2000):
        delta = rng.normal(gap, 0.5, n)
        found += abs(delta.mean()) > 1.96 * delta.std(ddof=1) / n**0.5
    assert 0.77 <= found / 2000 <= 0.83


def test_paired_test_sees_what_is_paired() -> None:
    a = [float(i % 2) for i in range(100)]
    better = [1.0 if i < 12 else v for i, v in enumerate(a)]
    paired = paired_difference(a, better)
    assert paired.difference.value == pytest.approx(0.06)
    assert paired.difference.low > 0  # six gained, none lost: significant only because it is paired
    assert paired.p_not_better < 0.01
    same = paired_difference(a, a)
    assert (same.difference.low, same.difference.high, same.p_not_better, same.p_not_worse) == (0, 0, 1, 1)


def test_paired_p_value_is_near_the_exact_sign_test() -> None:
    """Eight gained, two lost: McNemar's exact one-sided p is 0.0547 (sum of binomial(10, k), k >= 8, over 1024)."""
    a = [0.0] * 8 + [1.0] * 2 + [1.0] * 20
    b = [1.0] * 8 + [0.0] * 2 + [1.0] * 20
    assert paired_difference(a, b).p_not_better == pytest.approx(56 / 1024, abs=0.04)
