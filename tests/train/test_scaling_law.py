"""Scaling laws: runs drawn from the law of Hoffmann et al. give that law back, its best sizes, and intervals that hold
what they should.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from llmworks.core.errors import DataError, MissingDependency
from llmworks.train import scaling_law as laws
from llmworks.train.scaling_law import ScalingRun

FLOOR, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28  # eq. 10 of the paper
WORK = (1e18, 3e18, 1e19, 3e19)


def loss(parameters: float, tokens: float) -> float:
    return FLOOR + A / parameters**ALPHA + B / tokens**BETA


def drawn(noise: float, seed: int = 0) -> list[ScalingRun]:
    rng = np.random.default_rng(seed)
    sizes = [(c, n) for c in WORK for n in np.geomspace((c / 6) ** 0.5 / 30, (c / 6) ** 0.5 / 2, 7)]
    return [ScalingRun(n, c / 6 / n, c, loss(n, c / 6 / n) * float(np.exp(rng.normal(0, noise)))) for c, n in sizes]


def best(work: float) -> float:
    """Equation 4."""
    ratio = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return float(ratio * (work / 6) ** (BETA / (ALPHA + BETA)))


def test_without_noise_the_law_comes_back() -> None:
    law = laws.fit_law(drawn(0.0), bootstrap_iters=20)
    assert (law.floor, law.alpha, law.beta) == pytest.approx((FLOOR, ALPHA, BETA), rel=0.01)
    assert law.predict(1e9, 2e10) == pytest.approx(loss(1e9, 2e10), rel=1e-4)
    parameters, tokens = law.find_compute_optimal(1e21)
    assert parameters == pytest.approx(best(1e21), rel=0.03)
    assert 6 * parameters * tokens == pytest.approx(1e21)


@pytest.mark.slow
def test_intervals_hold_what_they_should() -> None:
    """Of twenty sets of runs with noise of a thousandth, about nine of ten hold the larger run's loss, whose noise is
    the same.
    """
    rng, held = np.random.default_rng(5), 0
    for seed in range(20):
        interval = laws.fit_law(drawn(0.001, seed), bootstrap_iters=40, seed=seed).predict_interval(1e9, 2e10)
        held += interval.low <= loss(1e9, 2e10) * float(np.exp(rng.normal(0, 0.001))) <= interval.high
        assert interval.high - interval.low < 0.02
    assert 15 <= held <= 20


def test_valleys_are_where_the_law_has_them() -> None:
    found = laws.fit_isoflop_curves(drawn(0.0005), bootstrap_iters=50)
    assert [v.flops for v in found] == pytest.approx(list(WORK))
    for valley in found:
        assert valley.parameters is not None
        assert valley.parameters.value == pytest.approx(best(valley.flops), rel=0.1)
        assert valley.parameters.low <= valley.parameters.value <= valley.parameters.high
    _, exponent = laws.fit_power_law([v.flops for v in found], [v.parameters.value for v in found if v.parameters])
    assert exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.04)


def test_a_valley_outside_of_what_was_run_is_not_claimed() -> None:
    runs = [
        ScalingRun(n, 1e18 / 6 / n, 1e18, loss(n, 1e18 / 6 / n)) for n in np.geomspace(1e6, 1e7, 5)
    ]  # the best is 8e7
    (valley,) = laws.fit_isoflop_curves(runs, bootstrap_iters=20)
    assert valley.parameters is None


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="5 runs are too few"):
        laws.fit_law(drawn(0.0)[:5])
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependency, match=r"llmworks\[scaling\]"):
        laws.fit_law(drawn(0.0))
