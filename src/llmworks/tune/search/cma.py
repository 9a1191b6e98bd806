"""CMA-ES over numbers between bounds, with a journal: a search that was killed goes on, and is the search that it would
have been.

Knows no merge and no model.

Hansen and Ostermeier 2001; the package cma (Hansen), whose bounds are kept by a transformation. What is told is kept
line by line; a search that begins anew with the same seed asks for the same values, and those that are in the journal
are told at once.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmworks.core.errors import MissingDependency
from llmworks.tune.search.genome import Gene

STEP = 0.25  # of the range, in which the search begins


@dataclass(frozen=True)
class Attempt:
    """One set of values; its score, and those of its tasks."""

    number: int
    generation: int
    values: tuple[float, ...]
    score: float
    parts: dict[str, float]


Judge = Callable[[Sequence[float]], tuple[float, dict[str, float]]]


def evolve(
    genes: Sequence[Gene],
    judge: Judge,
    journal: Path,
    *,
    attempts: int,
    population: int,
    seed: int,
    told: Callable[[Attempt, bool], None] = lambda one, known: None,
) -> list[Attempt]:
    """Look for the values of the largest score; at least as many attempts as asked for, in whole generations.

    The first is what the genes begin as. MissingDependency without cma.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma
    except ImportError:
        raise MissingDependency("evolving a merge needs cma; install it with: pip install 'llmworks[tune]'") from None
    known = _read(journal)
    begin = [(gene.start - gene.low) / (gene.high - gene.low) for gene in genes]
    options = _options(seed, population)
    found: list[Attempt] = []

    def attempt(point: Sequence[float], generation: int) -> Attempt:
        values = tuple(
            round(gene.low + float(share) * (gene.high - gene.low), 6) for gene, share in zip(genes, point, strict=True)
        )
        before = known.get(values)
        score, parts = before or judge(values)
        score = score if math.isfinite(score) else min((one.score for one in found), default=0.0)
        made = Attempt(len(found), generation, values, score, parts)
        if before is None:
            with journal.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"values": list(values), "score": score, "parts": parts}) + "\n")
                stream.flush()
            known[values] = (score, parts)
        found.append(made)
        told(made, before is not None)
        return made

    attempt(begin, 0)
    if len(genes) == 1:  # CMA-ES has no covariance of one number: even steps
        steps = max(2, attempts - 1)
        for at in range(steps):
            attempt([at / (steps - 1)], 1)
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = cma.CMAEvolutionStrategy(begin, STEP, options)
        generation = 1
        while (
            len(found) < attempts
        ):  # its own rules to stop are for smooth functions: scores of few samples are often the same
            points = search.ask()
            search.tell(points, [-attempt(point, generation).score for point in points])
            generation += 1
    return found


def _options(seed: int, population: int) -> dict[str, Any]:
    """What the search is told."""
    options: dict[str, Any] = {
        "bounds": [0, 1],
        "seed": seed + 1,
        "popsize": population,
        "verbose": -9,
        "verb_log": 0,
    }  # 0 would be the clock's
    return options


def _read(journal: Path) -> dict[tuple[float, ...], tuple[float, dict[str, float]]]:
    """What a search that was killed has found out; a line that was cut off is left out."""
    found: dict[tuple[float, ...], tuple[float, dict[str, float]]] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            entry = json.loads(line)
            found[tuple(entry["values"])] = (float(entry["score"]), dict(entry["parts"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
