"""A merge whose numbers are found by evaluation: each attempt is merged, asked, and thrown away; its scores are kept in
a journal that a killed search goes on from.

The best is made to stay.

The search is `tune/search/cma.py`'s; this knows stages, tasks and the workspace.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmworks.core.artifact import Model, Report, canonical_json
from llmworks.core.errors import LlmworksError, UserError
from llmworks.core.workspace import Workspace
from llmworks.evaluate.suites import Item
from llmworks.merge.plan.config import MergeConfig
from llmworks.runtime.default_inputs import default_inputs
from llmworks.runtime.execute import execute
from llmworks.runtime.references import open_engine
from llmworks.runtime.resolve import resolve
from llmworks.tune.search.cma import Attempt, evolve
from llmworks.tune.search.genome import genes_of, with_values


@dataclass
class Evolution:
    """One search. `items`: tasks that it is searched by, `held`: others, which are asked once at the end."""

    name: str
    config: MergeConfig
    models: Mapping[str, Model]
    workspace: Workspace
    items: Sequence[Item]
    held: Sequence[Item] = ()
    attempts: int = 40
    population: int = 8
    gradient: int = 1
    negative: bool = False
    seed: int = 0
    say: Callable[[str], None] = print
    quiet: bool = True

    def made(self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Any], workspace: Workspace) -> Any:
        """One stage's artifact."""
        found = resolve(stage)
        checked = found.config.model_validate(dict(config))
        return execute(
            found,
            checked,
            default_inputs(found, checked, dict(inputs), self.workspace),
            workspace,
            seed=self.seed,
            open_engine=partial(open_engine, workspace=workspace),
            quiet=self.quiet,
        ).artifact

    def asked(self, model: Model, item: Item, workspace: Workspace) -> Report:
        """One evaluation."""
        report = self.made("evaluate", {"task": item.task, "limit": item.limit}, {"model": model}, workspace)
        assert isinstance(report, Report)
        return report

    def key(self, plain: Mapping[str, Any]) -> str:
        """What a journal is of."""
        said = [
            plain,
            {name: model.digest for name, model in self.models.items()},
            [item.model_dump() for item in self.items],
            self.population,
            self.gradient,
            self.negative,
            self.seed,
        ]
        return hashlib.sha256(canonical_json(said).encode()).hexdigest()[:12]


def evolution(job: Evolution) -> tuple[Report, Model]:
    """(the page, the best merge).

    Errors: UserError for a merge without numbers, or no tasks; those of `merge` and `evaluate`.
    """
    if not job.items:
        raise UserError("no task is named that the merge is searched by; give --suite")
    if job.attempts < 2 or job.population < 2:
        raise UserError("--attempts and --population must be 2 or more")
    plain = job.config.model_dump(mode="json", exclude_defaults=True)
    genes = genes_of(plain, gradient=job.gradient, negative=job.negative)
    with (
        job.workspace.in_use(),
        job.workspace.lock(job.key(plain)),
    ):  # the same search in another process waits, and finds its attempts
        place = job.workspace.root / "scratch" / f"evolve-{job.key(plain)}"
        place.mkdir(parents=True, exist_ok=True)
        job.say(
            f"{len(genes)} numbers, {job.attempts} attempts, {len(job.items)} tasks each; what was tried before is not"
            " tried again"
        )

        def judge(values: Sequence[float]) -> tuple[float, dict[str, float]]:
            aside = Workspace(place / "attempt")
            shutil.rmtree(aside.root, ignore_errors=True)
            try:
                try:
                    child = job.made("merge", with_values(plain, genes, values), {"models": dict(job.models)}, aside)
                except UserError as error:  # numbers that a method refuses, as weights that sum to zero
                    if type(error) is not UserError:  # a model or a file is at fault, which says nothing of the numbers
                        raise
                    job.say(f"  no merge: {error}")
                    return 0.0, dict.fromkeys((item.task for item in job.items), 0.0)
                parts = {item.task: float(job.asked(child, item, aside).metrics["score"]) for item in job.items}
                return sum(parts.values()) / len(parts), parts
            finally:
                shutil.rmtree(aside.root, ignore_errors=True)

        def told(one: Attempt, known: bool) -> None:
            job.say(
                f"{'·' if known else '✓'} {one.number + 1:>3}  {one.score:.4f}  "
                + "  ".join(
                    f"{gene.name.removesuffix('.parameters')} {value:g}"
                    for gene, value in zip(genes, one.values, strict=True)
                )
            )

        found = evolve(
            genes,
            judge,
            place / "journal.jsonl",
            attempts=job.attempts,
            population=job.population,
            seed=job.seed,
            told=told,
        )
        best = max(found, key=lambda one: one.score)
        child = job.made("merge", with_values(plain, genes, best.values), {"models": dict(job.models)}, job.workspace)
        child.name = "best"
        page = _page(job, found, [gene.name for gene in genes], child)
        return page, child


def _page(job: Evolution, found: Sequence[Attempt], names: Sequence[str], child: Model) -> Report:
    """Parents and child on all tasks, and the page."""
    scores: dict[str, dict[str, list[float]]] = {}
    samples: dict[str, int] = {}
    reports: list[Report] = []
    for name, model in {"best": child, **job.models}.items():
        for item in [*job.items, *job.held]:
            try:
                report = job.asked(model, item, job.workspace)
            except LlmworksError as error:
                job.say(f"  not asked: {name} on {item.task}: {error}")
                continue
            scores.setdefault(name, {})[item.task] = [float(report.metrics[key]) for key in ("score", "low", "high")]
            samples[item.task] = int(report.metrics.get("samples", 0))
            reports.append(report)
    config = {
        "merge": job.name,
        "searched": [item.task for item in job.items],
        "scores": scores,
        "samples": samples,
        "attempts": [
            {
                "generation": one.generation,
                "values": dict(zip(names, one.values, strict=True)),
                "score": one.score,
                "parts": one.parts,
            }
            for one in found
        ],
    }
    page = job.made(
        "tune.evolution", config, {"models": [child, *job.models.values()], "reports": reports}, job.workspace
    )
    assert isinstance(page, Report)
    return page
