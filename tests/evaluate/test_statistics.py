"""Intervals and paired tests against exact results."""

from __future__ import annotations

import random

import pytest

from llmworks.evaluate.bootstrap import mean_interval, paired_difference
from llmworks.evaluate.task import load_task, task_names
from llmworks.score import score_function


def test_interval_of_a_proportion_is_the_normal_one() -> None:
    interval = mean_interval([1.0] * 300 + [0.0] * 700)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.004)
    assert interval.high == pytest.approx(0.3 + half, abs=0.004)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for trial in range(200):
        interval = mean_interval([float(rng.random() < 0.5) for _ in range(100)], seed=trial, resamples=1000)
        hits += interval.low <= 0.5 <= interval.high
    assert 180 <= hits <= 199


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


def test_built_in_tasks_are_valid() -> None:
    assert task_names() == ["function-call"]
    for name in task_names():
        task = load_task(name)
        assert task.name == name
        assert score_function(task.score)
