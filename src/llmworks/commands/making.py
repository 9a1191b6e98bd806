"""What `run`, `plan`, `stages` and a single stage print. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import amount, as_json, out, short, table, workspace_of
from llmworks.core.errors import GateFailed, UserError
from llmworks.core.report import TERMINAL
from llmworks.core.trackers import check as check_trackers
from llmworks.core.workers import Pool
from llmworks.core.workspace import check_out

if TYPE_CHECKING:
    from llmworks.core.workspace import Workspace
    from llmworks.runtime.execute import Outcome
    from llmworks.runtime.recipe import Expect
    from llmworks.runtime.runner import Judgement, Run
    from llmworks.train.estimate.pretrain import Estimate


BEFORE = 250_000_000  # bytes of libraries that steps before a training load in the same process, about


def pool_of(args: argparse.Namespace) -> Pool:
    """Where the parts of a stage run."""
    return Pool(args.workers, args.engine, args.address)


def run(args: argparse.Namespace) -> None:
    """`llmworks run RECIPE`."""
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import Run

    recipe = load_recipe(args.recipe, args.set)
    workspace = workspace_of(args)
    target = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=target, flush=True)

    say(f"{recipe.name}: {len(recipe.steps)} steps in {short(workspace.root)}")
    check_trackers(args.track)
    job = Run(recipe, workspace, say=say, quiet=args.quiet, pool=pool_of(args), track=args.track)
    done = job.run(explain=args.explain)
    made = sum(j.state == "made" for j in done)
    if args.json:
        as_json(
            [
                {
                    "step": j.name,
                    "state": j.state,
                    "why": j.why,
                    "digest": j.artifact.digest if j.artifact else None,
                    "path": str(j.artifact.path) if j.artifact else None,
                }
                for j in done
            ]
        )
        return
    out(
        f"\n{made} steps made, {sum(j.state == 'up to date' for j in done)} up to date."
        if made
        else "\nEverything is up to date."
    )
    if page := job.report_path():
        out(f"Report: {short(page)}")
    if recipe.next:
        out("Next:")
        for line in recipe.next:
            out(f"  {line.replace('{workspace}', str(short(workspace.root)))}")


def plan(args: argparse.Namespace) -> None:
    """`llmworks plan RECIPE`."""
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import Run

    recipe = load_recipe(args.recipe, args.set)
    job = Run(recipe, workspace_of(args))
    judgements = job.plan()
    trainings = _trainings(job, judgements, args)
    judgements = [
        (
            replace(j, expect=trainings[j.name][1], expect_from="tried here")
            if trainings.get(j.name, (None, None))[1] is not None
            else j
        )
        for j in judgements
    ]
    if args.json:
        known = {
            name: {
                "parameters": t.parameters,
                "learned": t.learned,
                "steps": t.steps,
                "tokens": t.read,
                "operations": t.work,
                "memory_bytes": t.memory,
            }
            for name, (t, _) in trainings.items()
        }
        as_json(
            [
                {
                    "step": j.name,
                    "state": j.state,
                    "why": j.why,
                    "expect": j.expect.model_dump() if j.expect else None,
                    "training": known.get(j.name),
                }
                for j in judgements
            ]
        )
        return
    pending = [j for j in judgements if j.state in ("to run", "waits")]
    rows = []
    for j in judgements:
        e = j.expect if j.state in ("to run", "waits") else None
        rows.append(
            (
                j.name,
                j.state,
                amount(e.seconds if e else 0, "s"),
                amount(e.memory_mb if e else 0, "MB"),
                amount(e.disk_mb if e else 0, "MB"),
                j.why,
            )
        )
    table(("step", "state", "time", "memory", "disk", "why"), rows)
    expected = [j.expect for j in pending if j.expect]
    foreseen = any(e.seconds or e.disk_mb for e in expected)
    out(
        f"\n{len(pending)} steps to run; nothing is known of their time, memory and disk yet."
        if pending and not foreseen
        else (
            f"\n{len(pending)} steps to run: about {sum(e.seconds for e in expected) / 60:.1f} minutes,"
            f" {max((e.memory_mb for e in expected), default=0) / 1e3:.1f} GB of memory,"
            f" {sum(e.disk_mb for e in expected) / 1e3:.2f} GB of disk."
        )
    )
    sources = sorted({j.expect_from for j in pending if j.expect_from})
    unknown = [j.name for j in pending if j.expect is None or not any((j.expect.seconds, j.expect.disk_mb))]
    _say_trainings(trainings)
    if sources:
        out(f"Figures: {', '.join(sources)}." + (f" Nothing is known of {', '.join(unknown)}." if unknown else ""))


def _trainings(
    job: Run, judgements: list[Judgement], args: argparse.Namespace
) -> dict[str, tuple[Estimate, Expect | None]]:
    """The trainings that are to run, by step, and what a few of their steps took here where that is asked for."""
    from llmworks.workflows.estimate import estimate_of

    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: it must be a number of processes")
    if args.attempt and args.processes > 1:
        raise UserError("--try runs the steps in one process, here; leave out --processes, or --try")
    found: dict[str, tuple[Estimate, Expect | None]] = {}
    for j in judgements:
        training = (
            estimate_of(job.recipe, job.found, j.name, args.processes) if j.state in ("to run", "waits") else None
        )
        if training is not None:
            before = any(
                o.state in ("to run", "waits") and o.name not in found for o in judgements[: judgements.index(j)]
            )
            found[j.name] = (
                training,
                _tried(j.name, training, BEFORE if before else 0) if args.attempt and training.ready else None,
            )
    return found


def _tried(name: str, training: Estimate, before: int) -> Expect:
    from llmworks.runtime.recipe import Expect

    print(f"trying a few steps of {name} ...", file=sys.stderr, flush=True)
    trial = training.attempt()
    size = 4 * training.saved / 1e6
    return Expect(
        seconds=training.seconds(trial) if training.steps else 0, memory_mb=(trial.memory + before) / 1e6, disk_mb=size
    )


def _say_trainings(trainings: dict[str, tuple[Estimate, Expect | None]]) -> None:
    if not trainings:
        return
    rows = []
    for name, (t, tried) in trainings.items():
        known = t.steps > 0
        memory = (
            f"{tried.memory_mb / 1e3:.2f} GB, tried"
            if tried
            else f"{'about' if known else 'at most'} {t.memory / 1e9:.1f} GB"
        )
        rows.append(
            (
                name,
                f"{t.parameters:,}",
                f"{t.learned:,}",
                f"{t.steps:,}" if known else "not known yet",
                f"{t.read:,}" if known else "",
                f"{t.work:.2g}" if known else "",
                memory,
            )
        )
    out()
    table(("training", "parameters", "learned", "steps", "tokens", "operations", "memory of a process"), rows)
    if not any(tried for _, tried in trainings.values()):
        out("Time and memory on this machine: the same command with --try.")
    if not all(t.steps for t, _ in trainings.values()):
        out(
            "Steps and time are known when the data of a training are made: `run` makes them first, and goes on when it"
            " was interrupted."
        )


def stages(args: argparse.Namespace) -> None:
    """`llmworks stages [NAME] [--schema]`."""
    from llmworks.runtime.config_help import config_help
    from llmworks.runtime.resolve import resolve
    from llmworks.runtime.stages import table as stage_table

    if args.schema:
        from llmworks.runtime.recipe_schema import recipe_schema

        as_json(recipe_schema())
        return
    if args.name:
        stage = resolve(args.name)
        out(
            f"{stage.name}  revision {stage.stage.revision}, {stage.stage.derivation}, makes"
            f" {'an' if stage.output.kind[0] in 'aeiou' else 'a'} {stage.output.kind}\n\n{stage.help}\n"
        )
        table(("input", "takes"), [(i.name, i.describe()) for i in stage.inputs.values()])
        out()
        table(("config", "type", "what"), config_help(stage.config))
        return
    if args.json:
        as_json(
            {
                name: {"summary": s.summary, "revision": s.revision, "derivation": s.derivation}
                for name, s in stage_table().items()
            }
        )
        return
    table(
        ("stage", "revision", "derivation", "what"),
        [(name, s.revision, s.derivation, s.summary) for name, s in sorted(stage_table().items())],
    )


def stage(args: argparse.Namespace) -> None:
    """`llmworks GROUP STAGE --INPUT REF ... --out DIR`: one stage, outside a recipe."""
    import yaml
    from pydantic import ValidationError

    from llmworks.runtime.default_inputs import default_inputs
    from llmworks.runtime.execute import execute, missing_inputs
    from llmworks.runtime.overrides import assign, config_problem
    from llmworks.runtime.references import open_engine

    stage, workspace = args.stage, workspace_of(args)
    values: dict[str, Any] = {}
    if args.config:
        try:
            values = yaml.safe_load(args.config.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"{args.config}: no such file; --config takes a YAML file of config fields") from None
        except yaml.MarkedYAMLError as error:
            raise UserError(
                f"{args.config}:{error.problem_mark.line + 1 if error.problem_mark else 1}: not YAML: {error.problem}"
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{args.config}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{args.config}: must be a mapping of config fields")
    for override in args.set:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value")
        assign(values, name.split("."), text)
    try:
        config = stage.config.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "; ".join(config_problem(stage.config, dict(e), f"{stage.name}.config") for e in error.errors())
        ) from None
    given = default_inputs(stage, config, _inputs(args, workspace), workspace)
    missing = missing_inputs(stage, given)
    if missing:
        raise UserError(f"--{missing[0]} ({stage.inputs[missing[0]].describe()}) is missing")
    if args.out is not None:
        check_out(args.out)
    elif stage.output.kind != "report":
        raise UserError("--out is missing: the name of the result")
    outcome = execute(
        stage,
        config,
        given,
        workspace,
        seed=args.seed,
        open_engine=partial(open_engine, workspace=workspace),
        quiet=args.quiet,
        pool=pool_of(args),
        track=args.track,
        announce=lambda line: print(f"  {line}", file=sys.stderr),
    )
    if args.out is not None:
        before = workspace.link_out(args.out, outcome.artifact)
        if before is not None and before.kind != outcome.artifact.kind:
            print(
                f"  {args.out} named a {before.kind} until now, which is still there: {short(before.path)}",
                file=sys.stderr,
            )
    failed = str(outcome.artifact.about.get("failed", ""))
    if args.json:
        as_json(
            {
                "path": str(outcome.artifact.path),
                "digest": outcome.artifact.digest,
                "made": outcome.made,
                "metrics": outcome.artifact.metrics,
            }
        )
    else:
        say_made(args.stage.name, args.out, outcome)
    if failed:
        raise GateFailed(failed)


def _inputs(args: argparse.Namespace, workspace: Workspace) -> dict[str, Any]:
    """The artifacts behind the references that were given, by input.

    UserError for one of the wrong kind, without a name, or too many.
    """
    from llmworks.runtime.references import resolve

    given: dict[str, Any] = {}
    for name, wanted in args.stage.inputs.items():
        refs = getattr(args, f"input_{name}")
        if not refs:
            continue
        if wanted.shape == "one" and len(refs) > 1:
            raise UserError(f"--{name} is given {len(refs)} times; it takes one {wanted.describe()}")
        keys = [ref.partition("=")[0] for ref in refs] if wanted.shape == "dict" else []
        unnamed = next(
            (ref for ref in refs if wanted.shape == "dict" and not (ref.partition("=")[0] and ref.partition("=")[2])),
            None,
        )
        if unnamed is not None:
            raise UserError(f"--{name} {unnamed}: give it a name, as in --{name} NAME={unnamed.strip('=') or 'REF'}")
        if len(set(keys)) < len(keys):
            raise UserError(f"--{name}: the name {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
        found = [resolve(ref.partition("=")[2] if wanted.shape == "dict" else ref, workspace=workspace) for ref in refs]
        for artifact in found:
            if not isinstance(artifact, wanted.kinds):
                adapter = (
                    "; give the model that it was trained on here and it as --adapter, or fold it into that model"
                    " (llmworks merge adapter)"
                    if artifact.kind == "adapter" and "adapter" in args.stage.inputs
                    else ""
                )
                raise UserError(
                    f"--{name}: {artifact.name} is {'an' if artifact.kind[0] in 'aei' else 'a'} {artifact.kind}, wanted"
                    f" is {wanted.describe()}{adapter}"
                )
        given[name] = (
            found[0]
            if wanted.shape == "one"
            else (
                found
                if wanted.shape == "list"
                else {ref.partition("=")[0]: a for ref, a in zip(refs, found, strict=True)}
            )
        )
    return given


def say_made(stage: str, name: Path | None, outcome: Outcome) -> None:
    """What a stage made, where it is, and what a report wants to be seen at once."""
    from llmworks.runtime.runner import facts
    from llmworks.tokenize.view import without_colours

    artifact = outcome.artifact
    terminal = artifact.path / TERMINAL
    if terminal.exists():
        text = terminal.read_text(encoding="utf-8")
        out((text if sys.stdout.isatty() else without_colours(text)).rstrip("\n") + "\n")
    out(
        f"✓ {stage}  {artifact.kind} {artifact.digest[:12]} "
        f" {'up to date' if not outcome.made else f'{outcome.seconds:.1f} s'}  {facts(artifact.metrics)}"
    )
    if name is None:
        out(f"Report: {short(artifact.path / 'report.html')}")
    else:
        chat = f'  llmworks chat {name} "Hello"\n' if artifact.kind == "model" else ""
        out(f"Result: {name}\nNext:\n{chat}  llmworks show {name}\n  llmworks tree {name}")
