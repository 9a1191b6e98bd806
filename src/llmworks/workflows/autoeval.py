"""Run a suite of tasks on models, then build the leaderboard of all evaluations in the workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report
from llmworks.core.errors import DataError, LlmworksError, UserError
from llmworks.core.workspace import Workspace
from llmworks.evaluate.leaderboard import entry_of
from llmworks.evaluate.suites import Item
from llmworks.runtime.resolve import resolve
from llmworks.runtime.runner import facts
from llmworks.runtime.session import Session, validate
from llmworks.workflows.family import family_with


@dataclass(frozen=True)
class Evaluations:
    """Result of a suite: the leaderboard, the evaluations, and (model, task, error) of what failed."""

    board: Report
    made: list[Report]
    missed: list[tuple[str, str, str]]


def autoeval(
    models: Sequence[Model | Adapter], items: Sequence[Item], session: Session, say: Callable[[str], None]
) -> Evaluations:
    """Evaluate every model on every task and build the leaderboard. UserError where every evaluation failed."""
    missed: list[tuple[str, str, str]] = []
    made: list[Report] = []
    for model in models:
        for item in items:
            try:
                made.append(_evaluate(model, item, session, say))
            except LlmworksError as error:  # a failing model or task must not stop the others
                missed.append((model.name, item.task, str(error)))
    if not made:
        raise UserError(f"every evaluation failed; {missed[0][1]}: {missed[0][2]}")
    reports = {r.digest: r for r in [*_earlier(session.workspace), *made]}
    several = len({r.about.get("model") for r in reports.values()}) > 1
    seen = _contaminations(made, session, say)
    inputs: dict[str, Any] = {
        "reports": sorted(reports.values(), key=lambda r: r.digest),
        **({"contaminations": sorted(seen, key=lambda r: r.digest)} if seen else {}),
    }
    config = {"model": models[0].digest, "title": f"{models[0].name} and others" if several else models[0].name}
    return Evaluations(session.make("evaluate.leaderboard", kind=Report, config=config, **inputs), made, missed)


def _evaluate(model: Model | Adapter, item: Item, session: Session, say: Callable[[str], None]) -> Report:
    """Evaluate a model on one task."""
    stage = resolve("evaluate")
    config = validate(stage, {"task": item.task, "limit": item.limit})
    outcome = session.run_stage(stage, config, {"model": model})
    assert isinstance(outcome.artifact, Report)
    took = f"{outcome.seconds:.0f} s" if outcome.made else "up to date"
    say(f"✓ {model.name}  {item.task}  {took}  {facts(outcome.artifact.metrics)}")
    return outcome.artifact


def _contaminations(made: Sequence[Report], session: Session, say: Callable[[str], None]) -> list[Report]:
    """Check the evaluations for contamination, as far as their models were trained in this workspace."""
    family = family_with(session.workspace)
    out: list[Report] = []
    for evaluation in made:
        trained = [
            n.artifact
            for n in family.trained_on(str(evaluation.about.get("model", "")))
            if isinstance(n.artifact, Dataset)
        ]
        if not trained:
            continue
        trained.sort(key=lambda d: d.digest)
        try:
            found = session.make("evaluate.contamination", kind=Report, evaluation=evaluation, trained=trained)
        except DataError as error:
            say(f"  contamination check failed: {evaluation.name}: {error}")
            continue
        say(
            f"  {evaluation.about.get('task')}: {found.metrics['touched']} of {found.metrics['samples']} samples occur"
            " in the model's training data"
        )
        out.append(found)
    return out


def _earlier(workspace: Workspace) -> list[Report]:
    """List all evaluations of the workspace that a leaderboard can read."""
    found: list[Report] = []
    for artifact in workspace.artifacts():
        if isinstance(artifact, Report) and artifact.manifest is not None and artifact.manifest.stage == "evaluate":
            try:
                entry = entry_of(artifact)
            except LlmworksError:  # of an older format
                continue
            if entry.data["protocol"].get("side") != "dev":  # a model may be trained on its rows
                found.append(artifact)
    return found
