"""Hyperparameter sweep over a recipe: each trial runs it with other field values, in one workspace, so that shared
steps are run only once.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Report
from llmworks.core.errors import GateFailed, LlmworksError, UserError
from llmworks.core.workspace import Workspace
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.recipe import Recipe, StageStep
from llmworks.runtime.runner import RecipeRun
from llmworks.runtime.session import Session
from llmworks.tune.search.optuna_study import SweepStudy, SweepTrial
from llmworks.tune.search.search_space import SweepConfig, format_overrides


@dataclass(frozen=True)
class TrialJob:
    """Input of a worker for one trial."""

    recipe: Path
    workspace: Path
    sets: tuple[str, ...]
    step: str
    metric: str


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial: the score or the error, and the digest of the step's artifact."""

    score: float | None
    error: str
    seconds: float
    digest: str = ""


def run_trial(unit: TrialJob) -> TrialResult:
    """Run the recipe with a trial's field values, without output."""
    began = time.monotonic()
    try:
        job = RecipeRun(load_recipe(unit.recipe, unit.sets), Workspace(unit.workspace), quiet=True)
        job.run()
        found = job.artifacts[unit.step]
        value = found.metrics.get(unit.metric)
        if isinstance(value, float) and not math.isfinite(value):
            return TrialResult(None, f"{unit.step}.{unit.metric} is {value}", time.monotonic() - began)
        if not isinstance(value, (int, float)):
            return TrialResult(
                None,
                f"{unit.step} has no metric {unit.metric!r}; it has {', '.join(sorted(map(str, found.metrics)))}",
                time.monotonic() - began,
            )
        return TrialResult(float(value), "", time.monotonic() - began, found.digest)
    except (LlmworksError, GateFailed) as error:
        return TrialResult(None, str(error), time.monotonic() - began)


def check_search(search: SweepConfig, recipe: Recipe, path: Path, sets: Sequence[str]) -> None:
    """Check that the recipe has the step and the fields and accepts their extreme values. UserError, RecipeError."""
    if not isinstance(recipe.steps.get(search.step_name), StageStep):
        raise UserError(
            f"metric {search.metric}: the recipe {recipe.name} has no stage {search.step_name!r}; it has"
            f" {', '.join(n for n, s in recipe.steps.items() if isinstance(s, StageStep))}"
        )
    for field, space in search.fields.items():
        for value in space.choices or [int(x) if space.whole else x for x in (space.low, space.high) if x is not None]:
            load_recipe(path, [*sets, *format_overrides({field: value})])


def sweep(
    path: Path,
    search: SweepConfig,
    session: Session,
    sets: Sequence[str] = (),
) -> Report:
    """Run trials until the requested number is reached; return the report.

    An interrupted sweep resumes; finally the recipe is run with the best trial's values, so that its names point there.

    Errors: UserError for a search that does not fit the recipe; DataError when no trial succeeds; MissingDependency
    without optuna.
    """
    pool, workspace, say = session.pool, session.workspace, session.say
    recipe = load_recipe(path, sets)
    check_search(search, recipe, path, sets)
    key = hashlib.sha256(
        "\n".join([path.read_text(encoding="utf-8"), search.model_dump_json(exclude={"trials"}), *sets]).encode()
    ).hexdigest()[:16]
    study = SweepStudy(search, workspace.root / "scratch" / f"sweep-{key}" / "journal.log")
    if study.trials:
        say(f"resuming after {len(study.trials)} trials")
    while (left := search.trials - len(study.trials)) > 0:
        batch = [study.ask() for _ in range(min(left, pool.workers))]
        units = [
            TrialJob(
                path, workspace.root, (*sets, *format_overrides(trial.values)), search.step_name, search.metric_name
            )
            for trial in batch
        ]
        for place, outcome in pool.map(run_trial, units):
            trial = batch[place]
            study.tell(SweepTrial(trial.number, trial.values, outcome.score, outcome.error, outcome.seconds))
            say(_format_trial(trial, outcome, search.metric))
    best = study.best
    results: list[Any] = []
    if best is not None:
        job = RecipeRun(load_recipe(path, [*sets, *format_overrides(best.values)]), workspace, quiet=True)
        job.run()
        results = [job.artifacts[search.step_name]]
    config = {
        "recipe": recipe.name,
        "metric": search.metric,
        "direction": search.direction,
        "importance": study.compute_importance(),
        "trials": [
            {
                "number": t.number,
                "values": dict(t.values),
                "score": t.score,
                "error": t.error,
                "seconds": round(t.seconds, 1),
            }
            for t in study.trials
        ],
    }
    inputs: dict[str, Any] = {"results": results} if results else {}
    return session.make("tune.trials", kind=Report, config=config, **inputs)


def _format_trial(trial: SweepTrial, outcome: TrialResult, metric: str) -> str:
    """Format the log line of a trial."""
    values = ", ".join(
        f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}"
        for field, value in trial.values.items()
    )
    score = outcome.error if outcome.score is None else f"{metric} {outcome.score:.4g}"
    return (
        f"{'·' if outcome.score is None else '✓'} trial {trial.number + 1}  {values}  {score}  {outcome.seconds:.0f} s"
    )
