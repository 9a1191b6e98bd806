"""What `autoeval` does with its arguments: a suite on a model, task by task, and the leaderboard of the workspace.

All logic is in the rooms below.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import as_json, out, short, workspace_of
from llmworks.core.errors import LlmworksError, UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Adapter, Model, Report
    from llmworks.core.workspace import Workspace
    from llmworks.evaluate.suites import Item


def autoeval(args: argparse.Namespace) -> None:
    """`llmworks autoeval MODEL ... [--suite NAMES]`."""
    from llmworks.core.artifact import Adapter, Model
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import items_of
    from llmworks.runtime.execute import execute
    from llmworks.runtime.references import open_engine, resolve
    from llmworks.runtime.resolve import resolve as resolve_stage

    if args.out is not None:
        check_out(args.out)
    workspace, items = workspace_of(args), items_of(args.suite, args.limit)
    models = [resolve(ref, workspace=workspace) for ref in args.models]
    for model in models:
        if not isinstance(model, (Model, Adapter)):
            raise UserError(f"{model.name}: is a {model.kind}, not a model")
    missed: list[tuple[str, str, str]] = []
    made: list[Report] = []
    for model in models:
        assert isinstance(model, (Model, Adapter))
        for item in items:
            found = _one(model, item, workspace, args.quiet)
            if isinstance(found, str):
                missed.append((model.name, item.task, found))
            else:
                made.append(found)
    if not made:
        raise UserError(f"nothing could be asked; {missed[0][1]}: {missed[0][2]}")
    stage = resolve_stage("evaluate.board")
    reports = {r.digest: r for r in [*_earlier(workspace), *made]}
    config = stage.config.model_validate(
        {
            "model": models[0].digest,
            "title": (
                f"{models[0].name} and others"
                if len({r.about.get("model") for r in reports.values()}) > 1
                else models[0].name
            ),
        }
    )
    seen = _seen(made, workspace)
    inputs: dict[str, Any] = {
        "reports": sorted(reports.values(), key=lambda r: r.digest),
        **({"contaminations": sorted(seen, key=lambda r: r.digest)} if seen else {}),
    }
    board = execute(
        stage, config, inputs, workspace, seed=0, open_engine=partial(open_engine, workspace=workspace), quiet=True
    ).artifact
    if args.out is not None:
        workspace.link_out(args.out, board)
    if args.json:
        as_json(
            {
                "board": str(board.path),
                "digest": board.digest,
                "scores": [_told(r) for r in made],
                "not_asked": [{"model": m, "task": t, "why": w} for m, t, w in missed],
            }
        )
        return
    for name, task, why in missed:
        print(f"  not asked: {name} on {task}: {why}", file=sys.stderr)
    out(
        f"\nLeaderboard: {short(board.path / 'report.html')}\nModel card section: {short(board.path / 'model-card.md')}"
    )


def _one(model: Model | Adapter, item: Item, workspace: Workspace, quiet: bool) -> Report | str:
    """One task on one model, or why it could not be asked."""
    from llmworks.core.artifact import Report
    from llmworks.runtime.default_inputs import default_inputs
    from llmworks.runtime.execute import execute
    from llmworks.runtime.references import open_engine
    from llmworks.runtime.resolve import resolve as resolve_stage
    from llmworks.runtime.runner import facts

    stage = resolve_stage("evaluate")
    config = stage.config.model_validate({"task": item.task, "limit": item.limit})
    try:
        inputs = default_inputs(stage, config, {"model": model}, workspace)
        outcome = execute(
            stage, config, inputs, workspace, seed=0, open_engine=partial(open_engine, workspace=workspace), quiet=quiet
        )
    except LlmworksError as error:  # one model or task that cannot be asked must not take the others with it
        return str(error)
    assert isinstance(outcome.artifact, Report)
    print(
        f"✓ {model.name}  {item.task}  {'up to date' if not outcome.made else f'{outcome.seconds:.0f} s'} "
        f" {facts(outcome.artifact.metrics)}",
        file=sys.stderr,
    )
    return outcome.artifact


def _seen(made: list[Report], workspace: Workspace) -> list[Report]:
    """What the models of these evaluations may have seen in training, as far as this workspace trained them."""
    from llmworks.core.artifact import Dataset, Report
    from llmworks.core.errors import DataError
    from llmworks.runtime.execute import execute
    from llmworks.runtime.references import open_engine
    from llmworks.runtime.resolve import resolve as resolve_stage
    from llmworks.workflows.family import family_with

    family, stage = family_with(workspace), resolve_stage("evaluate.contamination")
    out: list[Report] = []
    for evaluation in made:
        trained = [
            n.artifact
            for n in family.trained_on(str(evaluation.about.get("model", "")))
            if isinstance(n.artifact, Dataset)
        ]
        if not trained:
            continue
        try:
            found = execute(
                stage,
                stage.config(),
                {"evaluation": evaluation, "trained": sorted(trained, key=lambda d: d.digest)},
                workspace,
                seed=0,
                open_engine=open_engine,
                quiet=True,
            ).artifact
        except DataError as error:
            print(f"  not compared with its training data: {evaluation.name}: {error}", file=sys.stderr)
            continue
        assert isinstance(found, Report)
        print(
            f"  {evaluation.about.get('task')}: {found.metrics['touched']} of {found.metrics['samples']} samples stand"
            " in what the model was trained on",
            file=sys.stderr,
        )
        out.append(found)
    return out


def _earlier(workspace: Workspace) -> list[Report]:
    """All evaluations of the workspace that a leaderboard can read."""
    from llmworks.core.artifact import Report
    from llmworks.evaluate.board import entry_of

    found: list[Report] = []
    for artifact in workspace.artifacts():
        if isinstance(artifact, Report) and artifact.manifest is not None and artifact.manifest.stage == "evaluate":
            try:
                entry = entry_of(artifact)
            except LlmworksError:  # of an older form
                continue
            if entry.data["protocol"].get("side") != "practice":  # whose rows a model may be trained on
                found.append(artifact)
    return found


def _told(report: Report) -> dict[str, Any]:
    return {
        "task": report.about.get("task"),
        "model": report.about.get("model"),
        "path": str(report.path),
        **{k: report.metrics[k] for k in ("metric", "score", "low", "high", "samples")},
    }


def arena(args: argparse.Namespace) -> None:
    """`llmworks arena REPORT REPORT ... --votes FILE`."""
    import getpass

    from llmworks.core.artifact import Report
    from llmworks.evaluate.voting import vote
    from llmworks.runtime.references import resolve

    workspace = workspace_of(args)
    reports: list[Report] = []
    for ref in args.reports:
        found = resolve(ref, workspace=workspace)
        if not isinstance(found, Report):
            raise UserError(f"{ref}: is a {found.kind}, wanted is an evaluation (`llmworks evaluate`)")
        reports.append(found)
    count = vote(reports, args.votes, args.voter or getpass.getuser(), args.seed, sys.stdin, sys.stdout)
    out(f"\n{count} votes in {args.votes}. Ratings: llmworks evaluate arena --votes {args.votes}")


def _on_disk(fields: dict[str, Any]) -> dict[str, Any]:
    """A task of the harness whose files are paths: it knows none of our references."""
    from llmworks.data.readers.source import find_files
    from llmworks.runtime.references import resolve

    files = fields.get("dataset_kwargs", {}).get("data_files", {})
    for split, ref in files.items():
        if ref.startswith("asset:"):
            found = find_files(resolve(ref).path)
            files[split] = str(found[0]) if len(found) == 1 else list(map(str, found))
    return fields


def tasks(args: argparse.Namespace) -> None:
    """`llmworks tasks [NAME] [--harness]`."""
    import yaml

    from llmworks.commands.output import table
    from llmworks.evaluate.protocol.load_task import load_task, task_names
    from llmworks.evaluate.protocol.write_harness import to_harness
    from llmworks.evaluate.suites import suites

    if args.name:
        task = load_task(args.name)
        fields = _on_disk(to_harness(task)) if args.harness else task.model_dump(exclude_defaults=True)
        if args.json:
            as_json(fields)
        else:
            out(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=140).rstrip())
        return
    if args.harness:
        raise UserError("name the task that is to be written for the lm-evaluation-harness")
    found = {name: load_task(name) for name in task_names()}
    if args.json:
        as_json(
            {
                "tasks": {n: t.model_dump(exclude_defaults=True) for n, t in found.items()},
                "suites": {n: s.model_dump() for n, s in suites().items()},
            }
        )
        return
    table(
        ("task", "kind", "score", "data", "what"),
        [(n, t.kind, t.metrics[0].name, t.data, t.what) for n, t in found.items()],
    )
    out()
    table(("suite", "tasks"), [(n, ", ".join(i.task for i in s.tasks)) for n, s in suites().items()])
