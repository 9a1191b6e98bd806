"""`llmworks plan`: show what a recipe would run, why, and its time, memory and disk space."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import format_amount, print_json, print_line, print_table
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import get_workspace
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.runtime.recipe import Expect
    from llmworks.runtime.runner import RecipeRun, StepStatus
    from llmworks.train.estimate.pretrain import TrainingEstimate


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
    from llmworks.runtime.runner import RecipeRun

    recipe = load_recipe(args.recipe, args.set)
    job = RecipeRun(recipe, get_workspace(args))
    judgements = job.plan()
    trainings = _estimate_trainings(job, judgements, args)
    judgements = [
        (
            replace(j, expect=trainings[j.name][1], expect_source="measured with --measure")
            if trainings.get(j.name, (None, None))[1] is not None
            else j
        )
        for j in judgements
    ]
    if args.json:
        print_json(_steps_to_json(judgements, trainings))
        return
    _print_steps(judgements)
    pending = [j for j in judgements if j.state in ("to run", "waits")]
    expected = [j.expect for j in pending if j.expect]
    has_estimates = any(e.seconds or e.disk_mb for e in expected)
    print_line(
        f"\n{len(pending)} steps to run; their time, memory and disk space are unknown."
        if pending and not has_estimates
        else (
            f"\n{len(pending)} steps to run: about {sum(e.seconds for e in expected) / 60:.1f} minutes,"
            f" {max((e.memory_mb for e in expected), default=0) / 1e3:.1f} GB of memory,"
            f" {sum(e.disk_mb for e in expected) / 1e3:.2f} GB of disk."
        )
    )
    sources = sorted({j.expect_source for j in pending if j.expect_source})
    unknown = [j.name for j in pending if j.expect is None or not any((j.expect.seconds, j.expect.disk_mb))]
    _print_trainings(trainings)
    if sources:
        print_line(f"Estimates: {', '.join(sources)}." + (f" Unknown: {', '.join(unknown)}." if unknown else ""))


LIBRARY_BYTES = 250_000_000  # approximate memory of libraries that earlier steps load in the same process


def _steps_to_json(
    judgements: list[StepStatus], trainings: dict[str, tuple[TrainingEstimate, Expect | None]]
) -> list[dict[str, Any]]:
    """Return the steps for JSON output."""
    known = {
        name: {
            "parameters": t.parameters,
            "trainable_parameters": t.trainable_parameters,
            "steps": t.steps,
            "tokens": t.num_tokens,
            "operations": t.flops,
            "memory_bytes": t.memory,
        }
        for name, (t, _) in trainings.items()
    }
    return [
        {
            "step": j.name,
            "state": j.state,
            "why": j.reason,
            "expect": j.expect.model_dump() if j.expect else None,
            "training": known.get(j.name),
        }
        for j in judgements
    ]


def _print_steps(judgements: list[StepStatus]) -> None:
    """Print the table of steps."""
    rows = []
    for j in judgements:
        e = j.expect if j.state in ("to run", "waits") else None
        rows.append(
            (
                j.name,
                j.state,
                format_amount(e.seconds if e else 0, "s"),
                format_amount(e.memory_mb if e else 0, "MB"),
                format_amount(e.disk_mb if e else 0, "MB"),
                j.reason,
            )
        )
    print_table(("step", "state", "time", "memory", "disk", "why"), rows)


def _estimate_trainings(
    job: RecipeRun, judgements: list[StepStatus], args: argparse.Namespace
) -> dict[str, tuple[TrainingEstimate, Expect | None]]:
    """Return the estimates of pending trainings by step, with measurements of a few steps if requested."""
    from llmworks.workflows.estimate import estimate_step

    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: must be a positive integer")
    if args.measure and args.processes > 1:
        raise UserError("--measure runs in one local process; remove --processes or --measure")
    found: dict[str, tuple[TrainingEstimate, Expect | None]] = {}
    for j in judgements:
        training = (
            estimate_step(job.recipe, job.artifacts, j.name, args.processes) if j.state in ("to run", "waits") else None
        )
        if training is not None:
            before = any(
                o.state in ("to run", "waits") and o.name not in found for o in judgements[: judgements.index(j)]
            )
            found[j.name] = (
                training,
                _measure_training(j.name, training, LIBRARY_BYTES if before else 0)
                if args.measure and training.can_try
                else None,
            )
    return found


def _measure_training(name: str, training: TrainingEstimate, before: int) -> Expect:
    from llmworks.runtime.recipe import Expect

    print(f"running a few steps of {name} ...", file=sys.stderr, flush=True)
    trial = training.try_steps()
    size = 4 * training.saved_parameters / 1e6
    return Expect(
        seconds=training.estimate_seconds(trial) if training.steps else 0,
        memory_mb=(trial.memory + before) / 1e6,
        disk_mb=size,
    )


def _print_trainings(trainings: dict[str, tuple[TrainingEstimate, Expect | None]]) -> None:
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
                f"{t.trainable_parameters:,}",
                f"{t.steps:,}" if known else "unknown",
                f"{t.num_tokens:,}" if known else "",
                f"{t.flops:.2g}" if known else "",
                memory,
            )
        )
    print_line()
    print_table(("training", "parameters", "trainable", "steps", "tokens", "operations", "memory per process"), rows)
    if not any(tried for _, tried in trainings.values()):
        print_line("Add --measure to measure time and memory on this machine.")
    if not all(t.steps for t, _ in trainings.values()):
        print_line(
            "The number of steps is known once the training data exist: `run` makes them first, and resumes after"
            " an interruption."
        )
