"""Scaling laws: fit the loss of a training as a function of parameters and tokens, with confidence intervals.

Hoffmann et al. 2022 (Chinchilla, arXiv:2203.15556): the parametric form is approach 3 (section 3.3, eq. 10), the
IsoFLOP parabolas are approach 2 (section 3.2). Intervals as in Besiroglu et al. 2024 (arXiv:2404.10102): bootstrap over
runs, with a new fit each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmworks.core.errors import DataError, MissingDependency

HUBER_DELTA = 1e-3  # Huber delta, on log loss, as in the paper
CONFIDENCE = 0.9  # confidence level


@dataclass(frozen=True)
class ScalingRun:
    """One training: parameters, tokens, compute in FLOPs, and final loss in nats per token."""

    parameters: float
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True)
class ScalingInterval:
    """A value with its 90% bootstrap confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = irreducible_loss + a / N^alpha + b / D^beta.

    `bootstrap` [iterations, 5]: the five coefficients of each bootstrap sample; `residuals`: log measured minus log
    predicted loss.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    bootstrap: Any
    residuals: Any

    def predict(self, parameters: float, tokens: float) -> float:
        """Predict the loss."""
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def predict_interval(self, parameters: float, tokens: float) -> ScalingInterval:
        """Predict the loss of one run with its interval: bootstrap fits plus residuals of the fit."""
        rng = np.random.default_rng(1)
        floor, a, alpha, b, beta = self.bootstrap.T
        means = floor + a / parameters**alpha + b / tokens**beta
        spread = self.residuals * np.sqrt(
            len(self.residuals) / max(1, len(self.residuals) - 5)
        )  # five degrees of freedom are used by the fit
        found = means * np.exp(rng.choice(spread, (20, len(means))))
        return ScalingInterval(self.predict(parameters, tokens), *_compute_bounds(found))

    def get_coefficient(self, name: str) -> ScalingInterval:
        """Return a coefficient with its interval."""
        column = ("floor", "a", "alpha", "b", "beta").index(name)
        return ScalingInterval(getattr(self, name), *_compute_bounds(self.bootstrap[:, column]))

    def find_compute_optimal(self, flops: float, flops_per_token: float = 6.0) -> tuple[float, float]:
        """Return compute-optimal (parameters, tokens) for a FLOP budget (eq. 4).

        `flops_per_token`: FLOPs per parameter and token, usually 6.
        """
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        total = flops / flops_per_token
        parameters = ratio * total ** (self.beta / (self.alpha + self.beta))
        return float(parameters), float(total / parameters)


@dataclass(frozen=True)
class IsoFlopCurve:
    """IsoFLOP curve: runs of equal compute and the parabola of their loss over log parameters.

    `coefficients`: those of the parabola; `parameters`: its minimum, None if outside the sizes that were run.
    """

    flops: float
    coefficients: tuple[float, float, float]
    parameters: ScalingInterval | None


def fit_law(runs: Sequence[ScalingRun], bootstrap_iters: int = 200, seed: int = 0) -> ScalingLaw:
    """Fit the law by least Huber loss on log loss, from many initializations.

    Errors: DataError for fewer than six runs; MissingDependency without scipy.
    """
    if len(runs) < 6 or len({r.parameters for r in runs}) < 3 or len({r.tokens for r in runs}) < 3:
        raise DataError(
            f"a scaling law has five coefficients; {len(runs)} runs are too few, or have too few sizes, to fit it:"
            " add sizes or flops"
        )
    if not all(np.isfinite(r.loss) and r.loss > 0 for r in runs):
        raise DataError("the loss of a run is not a finite number above zero")
    size, tokens, loss = (np.log([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "loss"))
    # initializations: exponents from the paper's grid, each term at most as large as the loss
    starts = [
        (np.log(floor), share + alpha * size.mean(), alpha, share + beta * tokens.mean(), beta)
        for alpha, beta, floor, share in itertools.product((0.2, 0.4, 0.8), (0.2, 0.4, 0.8), (0.5, 1.5), (-1.0, 0.5))
    ]
    found = min((_minimize_huber(np.array(start), size, tokens, loss) for start in starts), key=lambda x: x[1])[0]
    rng = np.random.default_rng(seed)
    again: list[Any] = []
    while len(again) < bootstrap_iters:
        chosen = rng.integers(len(runs), size=len(runs))
        if len(set(size[chosen])) > 2 and len(set(tokens[chosen])) > 2:
            again.append(_minimize_huber(found, size[chosen], tokens[chosen], loss[chosen])[0])
    return ScalingLaw(
        *_to_coefficients(found),
        bootstrap=np.array([_to_coefficients(x) for x in again]),
        residuals=loss - _predict_log_loss(found, size, tokens)[0],
    )


def fit_isoflop_curves(runs: Sequence[ScalingRun], bootstrap_iters: int = 200, seed: int = 0) -> list[IsoFlopCurve]:
    """Fit the IsoFLOP parabola of each compute budget that has at least four model sizes.

    Runs have the same budget when their compute differs by less than a tenth.
    """
    groups: list[list[ScalingRun]] = []
    for run in sorted(runs, key=lambda r: r.flops):
        if groups and run.flops < 1.1 * groups[-1][0].flops:
            groups[-1].append(run)
        else:
            groups.append([run])
    rng, found = np.random.default_rng(seed), []
    for group in (g for g in groups if len({r.parameters for r in g}) >= 4):
        x, y = np.log([r.parameters for r in group]), np.array([r.loss for r in group])
        curve = np.polyfit(x, y, 2)
        residuals = (y - np.polyval(curve, x)) * np.sqrt(len(x) / max(1, len(x) - 3))
        low, high = x.min() - 0.7, x.max() + 0.7  # from half to twice the sizes that were run
        place = _find_minimum(curve)
        inside = [
            p
            for _ in range(bootstrap_iters)
            if (p := _find_minimum(np.polyfit(x, np.polyval(curve, x) + rng.choice(residuals, len(x)), 2))) is not None
            and low < p < high
        ]
        least = (
            ScalingInterval(float(np.exp(place)), *_compute_bounds(np.exp(inside)))
            if place is not None and x.min() < place < x.max() and len(inside) > bootstrap_iters / 2
            else None
        )
        found.append(IsoFlopCurve(float(np.mean([r.flops for r in group])), tuple(curve), least))
    return found


def fit_power_law(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Fit y = factor x^exponent by least squares on logarithms; return (factor, exponent)."""
    exponent, log_factor = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(np.exp(log_factor)), float(exponent)


def _find_minimum(curve: Any) -> float | None:
    """Return the minimum of a parabola; None if it opens downward."""
    return float(-curve[1] / (2 * curve[0])) if curve[0] > 0 else None


def _compute_bounds(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def _to_coefficients(x: Any) -> tuple[float, float, float, float, float]:
    """Convert (log irreducible loss, log a, alpha, log b, beta) to plain coefficients."""
    return float(np.exp(x[0])), float(np.exp(x[1])), float(x[2]), float(np.exp(x[3])), float(x[4])


def _predict_log_loss(x: Any, size: Any, tokens: Any) -> tuple[Any, Any]:
    """Return the log loss of each run and its gradient with respect to the five parameters [5, runs]."""
    parts = np.stack([np.full_like(size, x[0]), x[1] - x[2] * size, x[3] - x[4] * tokens])
    top = parts.max(0)
    weights = np.exp(parts - top)
    total = weights.sum(0)
    e, a, b = weights / total
    return top + np.log(total), np.stack([e, a, -a * size, b, -b * tokens])


def _minimize_huber(start: Any, size: Any, tokens: Any, loss: Any) -> tuple[Any, float]:
    """Minimize the Huber loss from one initialization; return (coefficients, objective)."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingDependency(
            "fitting a scaling law needs scipy; install it with: pip install 'llmworks[scaling]'"
        ) from None

    def objective(x: Any) -> tuple[float, Any]:
        predicted, slopes = _predict_log_loss(x, size, tokens)
        off = predicted - loss
        near = np.abs(off) <= HUBER_DELTA
        value = np.where(near, 0.5 * off**2, HUBER_DELTA * (np.abs(off) - 0.5 * HUBER_DELTA)).sum()
        return value / HUBER_DELTA, slopes @ np.where(near, off, HUBER_DELTA * np.sign(off)) / HUBER_DELTA

    done = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-3, 3), (-5, 60), (0.02, 3), (-5, 80), (0.02, 3)],
        options={"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return done.x, float(done.fun)
