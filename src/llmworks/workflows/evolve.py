"""Evolutionary model merging: each candidate is merged, evaluated and deleted; scores are kept in a journal, so that an
interrupted search resumes.

The best merge is kept.

The optimizer is in `tune/search/cma.py`; this module handles stages, tasks and the workspace.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Model, Report, canonical_json
from llmworks.core.errors import LlmworksError, UserError
from llmworks.evaluate.suites import SuiteTask
from llmworks.merge.plan.config import MergeConfig
from llmworks.runtime.session import Session
from llmworks.tune.search.cma import MergeCandidate, evolve
from llmworks.tune.search.genome import list_parameters, set_values


@dataclass
class EvolutionJob:
    """One search. `items`: tasks to optimize; `heldout_items`: held-out tasks, evaluated once at the end."""

    name: str
    config: MergeConfig
    models: Mapping[str, Model]
    session: Session
    items: Sequence[SuiteTask]
    heldout_items: Sequence[SuiteTask] = ()
    attempts: int = 40
    population: int = 8
    gradient: int = 1
    negative: bool = False
    say: Callable[[str], None] = print

    def evaluate(self, model: Model, item: SuiteTask, session: Session) -> Report:
        """Evaluate a model on one task."""
        return session.make("evaluate", kind=Report, config={"task": item.task, "limit": item.limit}, model=model)

    def merge(self, plain: Mapping[str, Any], session: Session) -> Model:
        """Merge the models by a configuration."""
        return session.make("merge", kind=Model, config=plain, models=dict(self.models))

    def compute_key(self, plain: Mapping[str, Any]) -> str:
        """Return the key of the journal: a hash of the search's settings."""
        settings = [
            plain,
            {name: model.digest for name, model in self.models.items()},
            [item.model_dump() for item in self.items],
            self.population,
            self.gradient,
            self.negative,
            self.session.seed,
        ]
        return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:12]


def run_evolution(job: EvolutionJob) -> tuple[Report, Model]:
    """Search for the best merge; return (the report, the best merge).

    Errors: UserError for a merge without numeric parameters, or no tasks; those of `merge` and `evaluate`.
    """
    if not job.items:
        raise UserError("no task to optimize; give --suite")
    if job.attempts < 2 or job.population < 2:
        raise UserError("--attempts and --population must be 2 or more")
    plain = job.config.model_dump(mode="json", exclude_defaults=True)
    genes = list_parameters(plain, gradient=job.gradient, negative=job.negative)
    workspace = job.session.workspace
    # the same search in another process waits, then reuses the journal
    with workspace.mark_in_use(), workspace.lock(job.compute_key(plain)):
        place = workspace.root / "scratch" / f"evolve-{job.compute_key(plain)}"
        place.mkdir(parents=True, exist_ok=True)
        job.say(
            f"{len(genes)} parameters, {job.attempts} candidates, {len(job.items)} tasks each; earlier candidates are"
            " reused"
        )

        def log_candidate(one: MergeCandidate, known: bool) -> None:
            values = zip(genes, one.values, strict=True)
            job.say(
                f"{'·' if known else '✓'} {one.number + 1:>3}  {one.score:.4f}  "
                + "  ".join(f"{gene.name.removesuffix('.parameters')} {value:g}" for gene, value in values)
            )

        candidates = evolve(
            genes,
            lambda values: _score_candidate(job, set_values(plain, genes, values), place / "attempt"),
            place / "journal.jsonl",
            attempts=job.attempts,
            population=job.population,
            seed=job.session.seed,
            on_candidate=log_candidate,
        )
        best = max(candidates, key=lambda one: one.score)
        child = job.merge(set_values(plain, genes, best.values), job.session)
        child.name = "best"
        page = _write_report(job, candidates, [gene.name for gene in genes], child)
        return page, child


def _score_candidate(job: EvolutionJob, plain: Mapping[str, Any], place: Path) -> tuple[float, dict[str, float]]:
    """Score one candidate: (mean score, score by task); its artifacts are deleted."""
    scratch_session = job.session.with_workspace(place)
    shutil.rmtree(place, ignore_errors=True)
    try:
        try:
            child = job.merge(plain, scratch_session)
        except UserError as error:  # values that a method rejects, such as weights that sum to zero
            if type(error) is not UserError:  # a model or file error, not the values' fault
                raise
            job.say(f"  merge failed: {error}")
            return 0.0, dict.fromkeys((item.task for item in job.items), 0.0)
        parts = {item.task: float(job.evaluate(child, item, scratch_session).metrics["score"]) for item in job.items}
        return sum(parts.values()) / len(parts), parts
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_report(job: EvolutionJob, found: Sequence[MergeCandidate], names: Sequence[str], child: Model) -> Report:
    """Evaluate parents and child on all tasks, and write the report."""
    scores: dict[str, dict[str, list[float]]] = {}
    samples: dict[str, int] = {}
    reports: list[Report] = []
    for name, model in {"best": child, **job.models}.items():
        for item in [*job.items, *job.heldout_items]:
            try:
                report = job.evaluate(model, item, job.session)
            except LlmworksError as error:
                job.say(f"  evaluation failed: {name} on {item.task}: {error}")
                continue
            scores.setdefault(name, {})[item.task] = [float(report.metrics[key]) for key in ("score", "low", "high")]
            samples[item.task] = int(report.metrics.get("samples", 0))
            reports.append(report)
    config = {
        "merge": job.name,
        "search_tasks": [item.task for item in job.items],
        "scores": scores,
        "samples": samples,
        "attempts": [
            {
                "generation": one.generation,
                "values": dict(zip(names, one.values, strict=True)),
                "score": one.score,
                "parts": one.task_scores,
            }
            for one in found
        ],
    }
    return job.session.make(
        "tune.evolution", kind=Report, config=config, models=[child, *job.models.values()], reports=reports
    )
