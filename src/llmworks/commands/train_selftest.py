"""`llmworks train selftest`: check a recipe's training configuration on a shrunken model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.commands.output import as_json, out
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import workspace_of
from llmworks.core.errors import GateFailed, UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Dataset
    from llmworks.runtime.runner import Run
    from llmworks.train.estimate.finetune import Tuning
    from llmworks.train.estimate.pretrain import Training
    from llmworks.train.selftest.check import Check


def build_parser() -> Parser:
    """Return the parser of `llmworks train selftest`."""
    parser = new_parser(
        "train selftest",
        "Check the configuration of a recipe's trainings in seconds, each on a shrunken model and its first rows.",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("step", nargs="?", help="a training step; default: all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks train selftest RECIPE [STEP]`."""
    from llmworks.runtime.execute import threads, use_threads
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import Run

    job = Run(load_recipe(args.recipe, args.set), workspace_of(args))
    job.plan()
    trainings = _trainings(job, args)
    use_threads(threads())
    found = {name: _check(job, name, training, quiet=args.json) for name, training in trainings.items()}
    if args.json:
        as_json({name: [c.__dict__ for c in checks] for name, checks in found.items()})
    wrong = [f"{name}: {c.what}: {c.detail}" for name, checks in found.items() for c in checks if not c.holds]
    if wrong:
        raise GateFailed(f"{len(wrong)} of {sum(map(len, found.values()))} checks failed; the first is {wrong[0]}")


def _trainings(job: Run, args: argparse.Namespace) -> dict[str, Training | Tuning]:
    """Return the trainings to check, by step. UserError where there is none, or one that cannot run."""
    from llmworks.train.estimate.pretrain import Training
    from llmworks.workflows.estimate import training_of

    found = {name: training_of(job.recipe, job.found, name) for name in job.recipe.steps}
    trainings = {
        name: t for name, t in found.items() if t is not None and (isinstance(t, Training) or t.ready)
    }  # a fine-tuning is checked on its data, which must exist
    if args.step:
        if args.step not in trainings:
            raise UserError(
                f"{args.recipe}: {args.step!r} is not a training whose model is known; there are"
                f" {', '.join(trainings) or 'none'}"
            )
        trainings = {args.step: trainings[args.step]}
    if not trainings:
        raise UserError(
            f"{args.recipe}: no training whose model is known (model.new, model.recurrent, or an existing one;"
            " train.sft also needs its data)"
        )
    for name, training in trainings.items():
        try:
            training.check()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return trainings


def _check(job: Run, name: str, training: Training | Tuning, *, quiet: bool) -> list[Check]:
    """Run the checks of one training, and print each as it ends."""
    from llmworks.core.artifact import Dataset
    from llmworks.train.estimate.pretrain import Training
    from llmworks.train.selftest.pretrain import selftest

    began = time.monotonic()
    data = job.found.get(str(job.recipe.steps[name].inputs["data"]))  # type: ignore[union-attr]
    rows = data if isinstance(data, Dataset) else None
    if not quiet:
        told = "its first rows" if rows is not None else "random rows, since its data do not exist yet"
        out(f"{name}: {told}, a shrunken model of kind {getattr(training.shape, 'kind', 'decoder')}")
    found: list[Check] = []
    checks = (
        selftest(training.config, training.shape, rows)
        if isinstance(training, Training)
        else checks_of_tuning(training, rows)
    )
    for check in checks:
        found.append(check)
        if not quiet:
            out(f"{'✓' if check.holds else '✗'} {check.what:<42}{check.detail}")
    if not quiet:
        out(f"  {time.monotonic() - began:.0f} s\n")
    return found


def checks_of_tuning(tuning: Tuning, rows: Dataset | None) -> Iterator[Check]:
    """Yield the checks of a fine-tuning."""
    from llmworks.core.artifact import MANIFEST, Model, load
    from llmworks.train.selftest.finetune import selftest_sft

    assert rows is not None
    base = load(tuning.model) if (tuning.model / MANIFEST).exists() else None
    return selftest_sft(
        tuning.config,
        tuning.model,
        rows,
        golden=base if isinstance(base, Model) else None,
        teacher=tuning.teacher is not None,
    )
