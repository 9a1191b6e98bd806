"""`llmworks train selftest`: check a recipe's training configuration on a shrunken model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import get_workspace
from llmworks.core.errors import GateFailed, UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Dataset
    from llmworks.runtime.runner import RecipeRun
    from llmworks.train.estimate.finetune import FinetuneEstimate
    from llmworks.train.estimate.pretrain import PretrainEstimate
    from llmworks.train.selftest.check import SelftestCheck


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
    from llmworks.core.machine import get_thread_count, set_threads
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import RecipeRun

    job = RecipeRun(load_recipe(args.recipe, args.set), get_workspace(args))
    job.plan()
    trainings = _find_trainings(job, args)
    set_threads(get_thread_count())
    found = {name: _run_checks(job, name, training, quiet=args.json) for name, training in trainings.items()}
    if args.json:
        print_json({name: [c.__dict__ for c in checks] for name, checks in found.items()})
    wrong = [f"{name}: {c.name}: {c.detail}" for name, checks in found.items() for c in checks if not c.passed]
    if wrong:
        raise GateFailed(f"{len(wrong)} of {sum(map(len, found.values()))} checks failed; the first is {wrong[0]}")


def _find_trainings(job: RecipeRun, args: argparse.Namespace) -> dict[str, PretrainEstimate | FinetuneEstimate]:
    """Return the trainings to check, by step. UserError where there is none, or one that cannot run."""
    from llmworks.train.estimate.pretrain import PretrainEstimate
    from llmworks.workflows.estimate import get_training

    found = {name: get_training(job.recipe, job.artifacts, name) for name in job.recipe.steps}
    trainings = {
        name: t for name, t in found.items() if t is not None and (isinstance(t, PretrainEstimate) or t.can_try)
    }  # a fine-tuning is checked on its data, which must exist
    if args.step:
        if args.step not in trainings:
            if args.step in job.recipe.steps and not trainings:
                raise UserError(
                    f"{args.recipe}: the model or the data of {args.step!r} are not made yet; first `llmworks run"
                    f" {args.recipe}`, or use a training whose model and data exist"
                )
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


def _run_checks(
    job: RecipeRun, name: str, training: PretrainEstimate | FinetuneEstimate, *, quiet: bool
) -> list[SelftestCheck]:
    """Run the checks of one training, and print each as it ends."""
    from llmworks.core.artifact import Dataset
    from llmworks.train.estimate.pretrain import PretrainEstimate
    from llmworks.train.selftest.pretrain import selftest_pretrain

    began = time.monotonic()
    data = job.artifacts.get(str(job.recipe.steps[name].inputs["data"]))  # type: ignore[union-attr]
    rows = data if isinstance(data, Dataset) else None
    if not quiet:
        rows_note = "its first rows" if rows is not None else "random rows, since its data do not exist yet"
        print_line(f"{name}: {rows_note}, a shrunken model of kind {getattr(training.shape, 'kind', 'decoder')}")
    found: list[SelftestCheck] = []
    checks = (
        selftest_pretrain(training.config, training.shape, rows)
        if isinstance(training, PretrainEstimate)
        else check_finetuning(training, rows)
    )
    for check in checks:
        found.append(check)
        if not quiet:
            print_line(f"{'✓' if check.passed else '✗'} {check.name:<42}{check.detail}")
    if not quiet:
        print_line(f"  {time.monotonic() - began:.0f} s\n")
    return found


def check_finetuning(tuning: FinetuneEstimate, rows: Dataset | None) -> Iterator[SelftestCheck]:
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
