"""Run a suite of tasks on models, then build the leaderboard of all evaluations in the workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report
from llmworks.core.errors import DataError, LlmworksError, UserError
from llmworks.core.workspace import Workspace
from llmworks.evaluate.statistics.entries import read_entry
from llmworks.evaluate.suites import SuiteTask
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.runner import format_metrics
from llmworks.runtime.session import Session, validate
from llmworks.workflows.family import build_workspace_family


@dataclass(frozen=True)
class SuiteResult:
    """Result of a suite: the leaderboard, the evaluations, and (model, task, error) of what failed."""

    leaderboard: Report
    reports: list[Report]
    failures: list[tuple[str, str, str]]


def autoeval(
    models: Sequence[Model | Adapter], items: Sequence[SuiteTask], session: Session, say: Callable[[str], None]
) -> SuiteResult:
    """Evaluate every model on every task and build the leaderboard. UserError where every evaluation failed."""
    failures: list[tuple[str, str, str]] = []
    evaluations: list[Report] = []
    for model in models:
        for item in items:
            try:
                evaluations.append(_evaluate(model, item, session, say))
            except LlmworksError as error:  # a failing model or task must not stop the others
                failures.append((model.name, item.task, str(error)))
    if not evaluations:
        raise UserError(f"every evaluation failed; {failures[0][1]}: {failures[0][2]}")
    reports = {r.digest: r for r in [*_list_evaluations(session.workspace), *evaluations]}
    several = len({r.about.get("model") for r in reports.values()}) > 1
    contaminations = _check_contamination(evaluations, session, say)
    inputs: dict[str, Any] = {
        "reports": sorted(reports.values(), key=lambda r: r.digest),
        **({"contaminations": sorted(contaminations, key=lambda r: r.digest)} if contaminations else {}),
    }
    config = {"model": models[0].digest, "title": f"{models[0].name} and others" if several else models[0].name}
    return SuiteResult(
        session.make("evaluate.leaderboard", kind=Report, config=config, **inputs), evaluations, failures
    )


def _evaluate(model: Model | Adapter, item: SuiteTask, session: Session, say: Callable[[str], None]) -> Report:
    """Evaluate a model on one task."""
    stage = resolve_stage("evaluate")
    config = validate(stage, {"task": item.task, "limit": item.limit})
    outcome = session.run_stage(stage, config, {"model": model})
    assert isinstance(outcome.artifact, Report)
    took = f"{outcome.seconds:.0f} s" if outcome.is_new else "up to date"
    say(f"✓ {model.name}  {item.task}  {took}  {format_metrics(outcome.artifact.metrics)}")
    return outcome.artifact


def _check_contamination(made: Sequence[Report], session: Session, say: Callable[[str], None]) -> list[Report]:
    """Check the evaluations for contamination, as far as their models were trained in this workspace."""
    family = build_workspace_family(session.workspace)
    out: list[Report] = []
    for evaluation in made:
        training_data = [
            n.artifact
            for n in family.list_training_data(str(evaluation.about.get("model", "")))
            if isinstance(n.artifact, Dataset)
        ]
        if not training_data:
            continue
        training_data.sort(key=lambda d: d.digest)
        try:
            contamination_report = session.make(
                "evaluate.contamination", kind=Report, evaluation=evaluation, training_data=training_data
            )
        except DataError as error:
            say(f"  contamination check failed: {evaluation.name}: {error}")
            continue
        say(
            f"  {evaluation.about.get('task')}: {contamination_report.metrics['touched']} of"
            f" {contamination_report.metrics['samples']} samples occur"
            " in the model's training data"
        )
        out.append(contamination_report)
    return out


def _list_evaluations(workspace: Workspace) -> list[Report]:
    """List all evaluations of the workspace that a leaderboard can read."""
    found: list[Report] = []
    for artifact in workspace.artifacts():
        if isinstance(artifact, Report) and artifact.manifest is not None and artifact.manifest.stage == "evaluate":
            try:
                entry = read_entry(artifact)
            except LlmworksError:  # of an older format
                continue
            if entry.data["protocol"].get("side") != "dev":  # a model may be trained on its rows
                found.append(artifact)
    return found
