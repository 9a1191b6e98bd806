"""Scaling laws: the loss of a training from its size and its tokens, fitted to small runs, with intervals.

Knows no model and no training.

Hoffmann et al. 2022 (arXiv:2203.15556): the parametric form is approach 3 (section 3.3, eq. 10), the parabolas are
approach 2 (section 3.2). Intervals are those of Besiroglu et al. 2024 (arXiv:2404.10102): runs are drawn again with
replacement, and the fit is made anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmworks.core.errors import DataError, MissingDependency

HUBER = 1e-3  # of differences of logarithms, as in the paper
OFTEN = 0.9  # share of draws that an interval holds


@dataclass(frozen=True)
class Run:
    """One training: parameters, tokens, operations, and the loss that it reached in nats a token."""

    parameters: float
    tokens: float
    work: float
    loss: float


@dataclass(frozen=True)
class Interval:
    """A value, and the middle nine tenths of what it is when runs are drawn again."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """L(N, D) = floor + a / N^alpha + b / D^beta.

    `draws` [times, 5]: the same five of runs drawn again; `residuals`: log measured less log predicted.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    draws: Any
    residuals: Any

    def at(self, parameters: float, tokens: float) -> float:
        """The loss that is expected."""
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def interval(self, parameters: float, tokens: float) -> Interval:
        """The loss that one run is expected to reach: draws of the law, each with a residual of the fit."""
        rng = np.random.default_rng(1)
        floor, a, alpha, b, beta = self.draws.T
        means = floor + a / parameters**alpha + b / tokens**beta
        spread = self.residuals * np.sqrt(
            len(self.residuals) / max(1, len(self.residuals) - 5)
        )  # five of them were fitted away
        found = means * np.exp(rng.choice(spread, (20, len(means))))
        return Interval(self.at(parameters, tokens), *_middle(found))

    def of(self, name: str) -> Interval:
        """A coefficient with its interval."""
        column = ("floor", "a", "alpha", "b", "beta").index(name)
        return Interval(getattr(self, name), *_middle(self.draws[:, column]))

    def best(self, work: float, each: float = 6.0) -> tuple[float, float]:
        """Parameters and tokens of the least loss for so many operations, of `each` per parameter and token (eq. 4)."""
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        total = work / each
        parameters = ratio * total ** (self.beta / (self.alpha + self.beta))
        return float(parameters), float(total / parameters)


@dataclass(frozen=True)
class Valley:
    """Runs of the same work: the parabola of their loss in log parameters, `curve` its coefficients, and where it is
    least (None: not among the sizes that were run).
    """

    work: float
    curve: tuple[float, float, float]
    parameters: Interval | None


def fit(runs: Sequence[Run], draws: int = 200, seed: int = 0) -> Law:
    """The law of least Huber loss between logarithms, from many beginnings.

    Errors: DataError for less than six runs; MissingDependency without scipy.
    """
    if len(runs) < 6 or len({r.parameters for r in runs}) < 3 or len({r.tokens for r in runs}) < 3:
        raise DataError(
            f"a law has five coefficients; {len(runs)} runs are too few, or of too few sizes, to fit it: give more"
            " sizes or more flops"
        )
    if not all(np.isfinite(r.loss) and r.loss > 0 for r in runs):
        raise DataError("the loss of a run is no number above zero")
    size, tokens, loss = (np.log([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "loss"))
    # beginnings: exponents of the paper's grid, each part as large as the loss or less
    starts = [
        (np.log(floor), share + alpha * size.mean(), alpha, share + beta * tokens.mean(), beta)
        for alpha, beta, floor, share in itertools.product((0.2, 0.4, 0.8), (0.2, 0.4, 0.8), (0.5, 1.5), (-1.0, 0.5))
    ]
    found = min((_least(np.array(start), size, tokens, loss) for start in starts), key=lambda x: x[1])[0]
    rng = np.random.default_rng(seed)
    again: list[Any] = []
    while len(again) < draws:
        chosen = rng.integers(len(runs), size=len(runs))
        if len(set(size[chosen])) > 2 and len(set(tokens[chosen])) > 2:
            again.append(_least(found, size[chosen], tokens[chosen], loss[chosen])[0])
    return Law(
        *_plain(found), draws=np.array([_plain(x) for x in again]), residuals=loss - _log(found, size, tokens)[0]
    )


def valleys(runs: Sequence[Run], draws: int = 200, seed: int = 0) -> list[Valley]:
    """The parabola of each amount of work that has four runs or more; runs are the same work when it differs by less
    than a tenth.
    """
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda r: r.work):
        if groups and run.work < 1.1 * groups[-1][0].work:
            groups[-1].append(run)
        else:
            groups.append([run])
    rng, found = np.random.default_rng(seed), []
    for group in (g for g in groups if len({r.parameters for r in g}) >= 4):
        x, y = np.log([r.parameters for r in group]), np.array([r.loss for r in group])
        curve = np.polyfit(x, y, 2)
        residuals = (y - np.polyval(curve, x)) * np.sqrt(len(x) / max(1, len(x) - 3))
        low, high = x.min() - 0.7, x.max() + 0.7  # up to twice and half of what was run
        place = _lowest(curve)
        inside = [
            p
            for _ in range(draws)
            if (p := _lowest(np.polyfit(x, np.polyval(curve, x) + rng.choice(residuals, len(x)), 2))) is not None
            and low < p < high
        ]
        least = (
            Interval(float(np.exp(place)), *_middle(np.exp(inside)))
            if place is not None and x.min() < place < x.max() and len(inside) > draws / 2
            else None
        )
        found.append(Valley(float(np.mean([r.work for r in group])), tuple(curve), least))
    return found


def power(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(factor, exponent) of y = factor x^exponent, by least squares of logarithms."""
    exponent, log_factor = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(np.exp(log_factor)), float(exponent)


def _lowest(curve: Any) -> float | None:
    """Where a parabola is least; None where it opens downward."""
    return float(-curve[1] / (2 * curve[0])) if curve[0] > 0 else None


def _middle(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - OFTEN) / 2, (1 + OFTEN) / 2))
    return float(low), float(high)


def _plain(x: Any) -> tuple[float, float, float, float, float]:
    """(log floor, log a, alpha, log b, beta) -> (floor, a, alpha, b, beta)."""
    return float(np.exp(x[0])), float(np.exp(x[1])), float(x[2]), float(np.exp(x[3])), float(x[4])


def _log(x: Any, size: Any, tokens: Any) -> tuple[Any, Any]:
    """Log L of each run, and how each of the five parts of `x` changes it, [5, runs]."""
    parts = np.stack([np.full_like(size, x[0]), x[1] - x[2] * size, x[3] - x[4] * tokens])
    top = parts.max(0)
    weights = np.exp(parts - top)
    total = weights.sum(0)
    e, a, b = weights / total
    return top + np.log(total), np.stack([e, a, -a * size, b, -b * tokens])


def _least(start: Any, size: Any, tokens: Any, loss: Any) -> tuple[Any, float]:
    """(coefficients, objective) of the nearest minimum."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingDependency(
            "a scaling law is fitted with scipy; install it with: pip install 'llmworks[scaling]'"
        ) from None

    def objective(x: Any) -> tuple[float, Any]:
        predicted, slopes = _log(x, size, tokens)
        off = predicted - loss
        near = np.abs(off) <= HUBER
        value = np.where(near, 0.5 * off**2, HUBER * (np.abs(off) - 0.5 * HUBER)).sum()
        return value / HUBER, slopes @ np.where(near, off, HUBER * np.sign(off)) / HUBER

    done = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-3, 3), (-5, 60), (0.02, 3), (-5, 80), (0.02, 3)],
        options={"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return done.x, float(done.fun)
