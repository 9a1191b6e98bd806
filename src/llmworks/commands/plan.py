"""`llmworks plan`: say what a recipe would run, why, and its time, memory and disk."""

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
    """The arguments of `llmworks plan`."""
    parser = new_parser("plan", "What would run, why, and its time, memory and disk. Runs and fetches nothing.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--measure",
        action="store_true",
        dest="measure",
        help="run a few steps of each training for its time and memory on this machine",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="how many train together (--nproc, torchrun), for memory of each",
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
            replace(j, expect=trainings[j.name][1], expect_from="tried here")
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


BEFORE = 250_000_000  # bytes of libraries that steps before a training load in the same process, about


def _steps_json(
    judgements: list[Judgement], trainings: dict[str, tuple[Estimate, Expect | None]]
) -> list[dict[str, Any]]:
    """The steps, for programs."""
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
    """The table of steps."""
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
    """The trainings that are to run, by step, and what a few of their steps took here where that is asked for."""
    from llmworks.workflows.estimate import estimate_of

    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: it must be a number of processes")
    if args.measure and args.processes > 1:
        raise UserError("--measure runs the steps in one process, here; leave out --processes, or --measure")
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
        out("Time and memory on this machine: the same command with --measure.")
    if not all(t.steps for t, _ in trainings.values()):
        out(
            "Steps and time are known when the data of a training are made: `run` makes them first, and goes on when it"
            " was interrupted."
        )
