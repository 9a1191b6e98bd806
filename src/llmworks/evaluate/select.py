"""Stage `evaluate.select`: keep the model with the best mean score, and report which skills it loses against the model
that is best at each task.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report, list_files
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.evaluate.statistics.bootstrap import paired_difference
from llmworks.evaluate.statistics.read_evaluation import read_evaluation

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class SelectConfig(Config):
    """Candidates for selection."""

    candidates: list[str] = Field(
        [], description="names of models that may be selected; empty: all. The others are only shown in the table"
    )


def select(config: SelectConfig, models: dict[str, Model], evaluations: list[Report], ctx: Context) -> Model:
    """Select the model with the largest mean score over all tasks, and return its files.

    Every model must be evaluated on the same tasks. Errors: DataError for missing evaluations, or evaluations of models
    that are not inputs.
    """
    strange = [name for name in config.candidates if name not in models]
    if strange:
        raise DataError(f"config.candidates: no model is named {strange[0]!r}; inputs: {', '.join(models)}")
    names = {model.digest: name for name, model in models.items()}
    found: dict[str, dict[str, tuple[Report, dict[str, Any]]]] = {}
    for report in evaluations:
        data = read_evaluation(report, "task", "model", of_samples=("score",))
        digest = str(report.about.get("model", ""))
        if digest not in names:
            raise DataError(
                f"{report.name}: evaluates a model that is not an input; add the model or leave out the report"
            )
        found.setdefault(names[digest], {})[str(data["task"])] = (report, data)
    tasks = list(dict.fromkeys(task for asked in found.values() for task in asked))
    missing = next(((name, task) for name in models for task in tasks if task not in found.get(name, {})), None)
    if missing is not None or not tasks:
        raise DataError(f"{missing[0]} has no evaluation on {missing[1]}" if missing else "no evaluations given")
    score = {name: {task: float(found[name][task][0].metrics["score"]) for task in tasks} for name in models}
    means = {name: sum(score[name].values()) / len(tasks) for name in models}
    chosen = max(config.candidates or list(models), key=lambda name: means[name])
    page = ctx.report
    rows, kept = [], []
    for task in tasks:
        first = max(models, key=lambda name: score[name][task])
        verdict = _describe_difference(found[first][task][1], found[chosen][task][1]) if first != chosen else "the best"
        kept.append(verdict)
        rows.append((task, f"{score[chosen][task]:.3f}", first, f"{score[first][task]:.3f}", verdict))
    page.title = f"Selected: {chosen}"
    lost = [task for task, verdict in zip(tasks, kept, strict=True) if verdict.startswith("worse")]
    page.subtitle = (
        f"Of {len(config.candidates or models)} models {chosen} has the best mean score, {means[chosen]:.3f}; "
        + (
            f"it is significantly worse than the best at {', '.join(lost)}."
            if lost
            else "it is not significantly worse than the best at any task."
        )
    )
    _describe_models(page, tasks, models, means, chosen, config, score, found)
    page.add_table(
        "Compared with the best model of each task",
        ("task", chosen, "best model", "score", "difference"),
        rows,
        "Paired over the same samples; the best of several scores is biased upward (winner's curse).",
    )
    page.data = {"kept": chosen, "scores": score, "means": means, "verdicts": dict(zip(tasks, kept, strict=True))}
    model = models[chosen]
    _link_files(model, ctx)
    ctx.progress.log(page.subtitle)
    return Model(
        ctx.out,
        golden=model.golden,
        metrics={"mean_score": means[chosen], "kept": chosen, "num_regressions": len(lost)},
        about={**model.about, "kept": chosen},
    )


def _describe_models(
    page: ReportBuilder,
    tasks: list[str],
    models: dict[str, Model],
    means: dict[str, float],
    chosen: str,
    config: SelectConfig,
    score: dict[str, dict[str, float]],
    evaluations_by_model: dict[str, dict[str, tuple[Report, dict[str, Any]]]],
) -> None:
    """Add the table of all models with their scores."""
    page.add_table(
        "All models",
        ("model", *tasks, "mean", ""),
        [
            (
                name,
                *(
                    f"{score[name][task]:.3f} ({evaluations_by_model[name][task][0].metrics['low']:.3f} to"
                    f" {evaluations_by_model[name][task][0].metrics['high']:.3f})"
                    for task in tasks
                ),
                f"{means[name]:.3f}",
                "selected"
                if name == chosen
                else ""
                if not config.candidates or name in config.candidates
                else "not a candidate",
            )
            for name in sorted(models, key=lambda name: -means[name])
        ],
        "95% intervals in parentheses.",
    )


def _link_files(model: Model, ctx: Context) -> None:
    """Hard-link the model's files into `out`, or copy them where links fail; its report is left out."""
    for file in list_files(model.path):
        if "report" not in file.relative_to(model.path).parts:
            target = ctx.out / file.relative_to(model.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), target)
            except OSError:
                shutil.copyfile(file, target)


def _describe_difference(best: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Describe the paired difference from the best model at a task, over shared samples."""
    first, second = ({str(sample["id"]): sample for sample in data["samples"]} for data in (best, own))
    both = [one for one in first if one in second]
    difference = paired_difference(
        [float(first[one]["score"]) for one in both],
        [float(second[one]["score"]) for one in both],
        groups=[str(first[one].get("group", "")) for one in both],
    ).difference
    return (
        f"{'worse' if difference.high < 0 else 'not significantly different'}: {difference.value:+.3f}"
        f" ({difference.low:+.3f} to {difference.high:+.3f})"
    )
