"""`llmworks plan`: show what a recipe would run, why, and its time, memory and disk space."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import amount, as_json, out, table
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import workspace_of
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.runtime.recipe import Expect
    from llmworks.runtime.runner import Judgement, Run
    from llmworks.train.estimate.pretrain import Estimate


def build_parser() -> Parser:
    """Return the parser of `llmworks plan`."""
    parser = new_parser(
        "plan", "Show what would run, why, and its time, memory and disk space. Runs and downloads nothing."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--measure",
        action="store_true",
        dest="measure",
        help="run a few steps of each training to measure time and memory on this machine",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number of distributed processes (--nproc, torchrun), for the memory of each",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks plan RECIPE`."""
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import Run

    recipe = load_recipe(args.recipe, args.set)
    job = Run(recipe, workspace_of(args))
    judgements = job.plan()
    trainings = _trainings(job, judgements, args)
    judgements = [
        (
            replace(j, expect=trainings[j.name][1], expect_from="measured with --measure")
            if trainings.get(j.name, (None, None))[1] is not None
            else j
        )
        for j in judgements
    ]
    if args.json:
        as_json(_steps_json(judgements, trainings))
        return
    _print_steps(judgements)
    pending = [j for j in judgements if j.state in ("to run", "waits")]
    expected = [j.expect for j in pending if j.expect]
    foreseen = any(e.seconds or e.disk_mb for e in expected)
    out(
        f"\n{len(pending)} steps to run; their time, memory and disk space are unknown."
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
        out(f"Estimates: {', '.join(sources)}." + (f" Unknown: {', '.join(unknown)}." if unknown else ""))


BEFORE = 250_000_000  # approximate memory of libraries that earlier steps load in the same process


def _steps_json(
    judgements: list[Judgement], trainings: dict[str, tuple[Estimate, Expect | None]]
) -> list[dict[str, Any]]:
    """Return the steps for JSON output."""
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
    return [
        {
            "step": j.name,
            "state": j.state,
            "why": j.why,
            "expect": j.expect.model_dump() if j.expect else None,
            "training": known.get(j.name),
        }
        for j in judgements
    ]


def _print_steps(judgements: list[Judgement]) -> None:
    """Print the table of steps."""
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


def _trainings(
    job: Run, judgements: list[Judgement], args: argparse.Namespace
) -> dict[str, tuple[Estimate, Expect | None]]:
    """Return the estimates of pending trainings by step, with measurements of a few steps if requested."""
    from llmworks.workflows.estimate import estimate_of

    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: must be a positive integer")
    if args.measure and args.processes > 1:
        raise UserError("--measure runs in one local process; remove --processes or --measure")
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
                _tried(j.name, training, BEFORE if before else 0) if args.measure and training.ready else None,
            )
    return found


def _tried(name: str, training: Estimate, before: int) -> Expect:
    from llmworks.runtime.recipe import Expect

    print(f"running a few steps of {name} ...", file=sys.stderr, flush=True)
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
            f"{tried.memory_mb / 1e3:.2f} GB, measured"
            if tried
            else f"{'about' if known else 'at most'} {t.memory / 1e9:.1f} GB"
        )
        rows.append(
            (
                name,
                f"{t.parameters:,}",
                f"{t.learned:,}",
                f"{t.steps:,}" if known else "unknown",
                f"{t.read:,}" if known else "",
                f"{t.work:.2g}" if known else "",
                memory,
            )
        )
    out()
    table(("training", "parameters", "trainable", "steps", "tokens", "operations", "memory per process"), rows)
    if not any(tried for _, tried in trainings.values()):
        out("Add --measure to measure time and memory on this machine.")
    if not all(t.steps for t, _ in trainings.values()):
        out(
            "The number of steps is known once the training data exist: `run` makes them first, and resumes after"
            " an interruption."
        )
