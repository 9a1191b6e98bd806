"""Ratings from pairwise votes: Bradley-Terry by maximum likelihood, with a style covariate, and Elo.

Pure functions on numbers.

Sources: Bradley & Terry 1952; Elo 1978; Chiang et al. 2024, Chatbot Arena (arXiv:2403.04132), section 5, and its style
control: the difference of the answers' lengths is an extra term of the logistic regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCALE, CENTER = 400 / math.log(10), 1000.0
RIDGE = 1e-3  # ridge (L2) penalty, in votes: keeps ratings finite where a model wins all its votes


@dataclass(frozen=True)
class Vote:
    """One vote: indices of two models, the score of the first (1 win, 0 loss, 0.5 tie), its relative answer length, and
    the question.
    """

    a: int
    b: int
    won: float
    style: float = 0.0
    question: str = ""


def relative_length(a: int, b: int) -> float:
    """Compute the relative length difference of two answers: (a - b) / (a + b), from -1 to 1."""
    return (a - b) / (a + b) if a + b else 0.0


def bradley_terry(votes: Sequence[Vote], models: int, weights: Any = None, *, style: bool = False) -> tuple[Any, float]:
    """Fit (ratings [models] on the Elo scale with mean 1000, style weight in nats or 0 without style) by maximum
    likelihood.

    P(a wins) = sigmoid(strength_a - strength_b + weight * style); a tie is half a vote for each. Newton's method.
    """
    import numpy as np

    n = np.ones(len(votes)) if weights is None else np.asarray(weights, dtype=float)
    design = np.zeros((len(votes), models + style))
    won = np.array([v.won for v in votes])
    for row, vote in enumerate(votes):
        design[row, vote.a] += 1
        design[row, vote.b] -= 1
        if style:
            design[row, models] = vote.style
    strength = np.zeros(models + style)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(design @ strength)))
        gradient = design.T @ (n * (won - p)) - RIDGE * strength
        curvature = design.T @ (design * (n * p * (1 - p))[:, None]) + RIDGE * np.eye(models + style)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 5 / max(1e-12, float(np.abs(step).max())))
        strength = strength + step
        if float(np.abs(step).max()) < 1e-9:
            break
    ratings = CENTER + SCALE * (strength[:models] - strength[:models].mean())
    return ratings, float(strength[models]) if style else 0.0


def bootstrap_ratings(
    votes: Sequence[Vote], models: int, *, style: bool = False, seed: int = 0, resamples: int = 500
) -> tuple[Any, int]:
    """Bootstrap the ratings: (ratings [resamples, models], number of independent draws); votes on one question are
    drawn together.
    """
    import numpy as np

    names = {q: i for i, q in enumerate(dict.fromkeys(v.question or f"#{i}" for i, v in enumerate(votes)))}
    places = np.array([names[v.question or f"#{i}"] for i, v in enumerate(votes)])
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [
            bradley_terry(
                votes, models, rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[places], style=style
            )[0]
            for _ in range(resamples)
        ]
    )
    return drawn, len(names)


def percentile_interval(resampled_values: Any, count: int) -> tuple[Any, Any]:
    """Return the 95% interval (low, high) of resampled values [resamples, ...] of `count` independent draws."""
    import numpy as np

    from llmworks.evaluate.statistics.bootstrap import compute_expanded_percentiles

    low, high = np.percentile(resampled_values, compute_expanded_percentiles(count), axis=0)
    return low, high


def elo(votes: Sequence[Vote], models: int, k: float = 4.0) -> list[float]:
    """Compute Elo ratings over the votes in order, all starting at 1000."""
    ratings = [CENTER] * models
    for vote in votes:
        expected = 1 / (1 + 10 ** ((ratings[vote.b] - ratings[vote.a]) / 400))
        ratings[vote.a] += k * (vote.won - expected)
        ratings[vote.b] -= k * (vote.won - expected)
    return ratings
