"""CMA-ES over bounded parameters, with a journal: an interrupted search resumes and gives the same result.

Does not know merges or models.

Hansen and Ostermeier 2001; the package cma (Hansen), which handles bounds by a transformation. Every evaluation is
appended to the journal; a restarted search with the same seed proposes the same candidates, and those in the journal
are not evaluated again.
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
from llmworks.tune.search.genome import MergeParameter

INITIAL_SIGMA = 0.25  # initial step size sigma, as a fraction of the range


@dataclass(frozen=True)
class MergeCandidate:
    """One candidate: its values, score and scores by task."""

    number: int
    generation: int
    values: tuple[float, ...]
    score: float
    task_scores: dict[str, float]


FitnessFunction = Callable[[Sequence[float]], tuple[float, dict[str, float]]]


def evolve(
    genes: Sequence[MergeParameter],
    fitness: FitnessFunction,
    journal: Path,
    *,
    attempts: int,
    population: int,
    seed: int,
    on_candidate: Callable[[MergeCandidate, bool], None] = lambda one, known: None,
) -> list[MergeCandidate]:
    """Maximize the score with CMA-ES; runs at least the requested number of candidates, in whole generations.

    The first candidate has the genes' start values. MissingDependency without cma.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma
    except ImportError:
        raise MissingDependency("evolutionary merging needs cma: pip install 'llmworks[tune]'") from None
    cached = _read_journal(journal)
    start = [(gene.start - gene.low) / (gene.high - gene.low) for gene in genes]
    options = _build_options(seed, population)
    candidates: list[MergeCandidate] = []

    def evaluate(point: Sequence[float], generation: int) -> MergeCandidate:
        values = tuple(
            round(gene.low + float(share) * (gene.high - gene.low), 6) for gene, share in zip(genes, point, strict=True)
        )
        before = cached.get(values)
        score, parts = before or fitness(values)
        score = score if math.isfinite(score) else min((one.score for one in candidates), default=0.0)
        made = MergeCandidate(len(candidates), generation, values, score, parts)
        if before is None:
            with journal.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"values": list(values), "score": score, "parts": parts}) + "\n")
                stream.flush()
            cached[values] = (score, parts)
        candidates.append(made)
        on_candidate(made, before is not None)
        return made

    evaluate(start, 0)
    if len(genes) == 1:  # CMA-ES needs two parameters or more: use an even grid
        steps = max(2, attempts - 1)
        for at in range(steps):
            evaluate([at / (steps - 1)], 1)
        return candidates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = cma.CMAEvolutionStrategy(start, INITIAL_SIGMA, options)
        generation = 1
        while (
            len(candidates) < attempts
        ):  # ignore CMA-ES's own stopping rules: they assume smooth functions, but scores of few samples often tie
            points = search.ask()
            search.tell(points, [-evaluate(point, generation).score for point in points])
            generation += 1
    return candidates


def _build_options(seed: int, population: int) -> dict[str, Any]:
    """Build the options of CMA-ES."""
    options: dict[str, Any] = {
        "bounds": [0, 1],
        "seed": seed + 1,
        "popsize": population,
        "verbose": -9,
        "verb_log": 0,
    }  # seed 0 would mean a seed from the clock
    return options


def _read_journal(journal: Path) -> dict[tuple[float, ...], tuple[float, dict[str, float]]]:
    """Read the results of an interrupted search; a truncated line is skipped."""
    found: dict[tuple[float, ...], tuple[float, dict[str, float]]] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            entry = json.loads(line)
            found[tuple(entry["values"])] = (float(entry["score"]), dict(entry["parts"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
