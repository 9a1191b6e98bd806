"""What `train selftest` prints. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmworks.commands.output import as_json, out, workspace_of
from llmworks.core.errors import GateFailed, UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Dataset
    from llmworks.train.estimate.finetune import Tuning
    from llmworks.train.estimate.pretrain import Training
    from llmworks.train.selftest.check import Check


def selftest(args: argparse.Namespace) -> None:
    """`llmworks train selftest RECIPE [STEP]`."""
    from llmworks.core.artifact import Dataset
    from llmworks.runtime.execute import threads, use_threads
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import Run
    from llmworks.train.estimate.pretrain import Training
    from llmworks.train.selftest.pretrain import selftest as checks_of
    from llmworks.workflows.estimate import training_of, tuning_of

    recipe = load_recipe(args.recipe, args.set)
    job = Run(recipe, workspace_of(args))
    job.plan()
    trainings: dict[str, Training | Tuning] = {
        name: t
        for name in recipe.steps
        if (t := training_of(recipe, job.found, name) or _tuning(tuning_of(recipe, job.found, name))) is not None
    }
    if args.step:
        if args.step not in trainings:
            raise UserError(
                f"{args.recipe}: {args.step!r} is no training whose model is known; there are"
                f" {', '.join(trainings) or 'none'}"
            )
        trainings = {args.step: trainings[args.step]}
    if not trainings:
        raise UserError(
            f"{args.recipe}: has no training whose model is known (model.new, model.recurrent, or one that was made; of"
            " train.sft its data, too)"
        )
    for name, training in trainings.items():
        try:
            training.check()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    use_threads(threads())
    found: dict[str, list[Check]] = {}
    wrong: list[str] = []
    for name, training in trainings.items():
        began = time.monotonic()
        data = job.found.get(str(recipe.steps[name].inputs["data"]))  # type: ignore[union-attr]
        rows = data if isinstance(data, Dataset) else None
        if not args.json:
            out(
                f"{name}:"
                f" {'its first rows' if rows is not None else 'rows that are drawn, since its own are not made yet'}, a"
                f" model of {training.shape.kind if hasattr(training.shape, 'kind') else 'its switches'}, shrunken"
            )
        found[name] = []
        for check in (
            checks_of(training.config, training.shape, rows)
            if isinstance(training, Training)
            else checks_of_tuning(training, rows)
        ):
            found[name].append(check)
            if not args.json:
                out(f"{'✓' if check.holds else '✗'} {check.what:<42}{check.detail}")
        wrong += [f"{name}: {c.what}: {c.detail}" for c in found[name] if not c.holds]
        if not args.json:
            out(f"  {time.monotonic() - began:.0f} s\n")
    if args.json:
        as_json({name: [c.__dict__ for c in checks] for name, checks in found.items()})
    if wrong:
        raise GateFailed(
            f"{len(wrong)} of {sum(len(checks) for checks in found.values())} checks do not hold; the first is"
            f" {wrong[0]}"
        )


def _tuning(tuning: Tuning | None) -> Tuning | None:
    """A fine-tuning whose rows are there: it is tested on them."""
    return tuning if tuning is not None and tuning.ready else None


def checks_of_tuning(tuning: Tuning, rows: Dataset | None) -> Iterator[Check]:
    """The checks of a fine-tuning."""
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
