"""Stage `tune.evolution`: the page of a search for a merge's numbers: its curve, the numbers that were chosen, and what
parents and child score, on tasks that were searched by and on others.

Knows no optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class Attempted(Config):
    """One attempt."""

    generation: int = Field(description="its generation; 0: what the file had")
    values: dict[str, float] = Field(description="the numbers that were set")
    score: float = Field(description="the mean of the tasks it was searched by")
    parts: dict[str, float] = Field({}, description="by task")


class EvolutionConfig(Config):
    """What was tried."""

    merge: str = Field(description="what was merged")
    attempts: list[Attempted] = Field(min_length=1, description="all attempts, in their order")
    search_tasks: list[str] = Field(description="tasks that were searched by")
    scores: dict[str, dict[str, list[float]]] = Field(
        {}, description="by model, by task: the score, and the ends of its interval"
    )
    samples: dict[str, int] = Field({}, description="samples of each task")


def evolution(
    config: EvolutionConfig, ctx: Context, models: list[Model] | None = None, reports: list[Report] | None = None
) -> Report:
    """The curve, the best numbers, the scores.

    `models`: the best child, then its parents; `reports`: their evaluations.
    """
    best = max(config.attempts, key=lambda one: one.score)
    first = config.attempts[0]
    page = ctx.report
    page.title = f"Evolution of {config.merge}"
    page.lead = (
        f"Of {len(config.attempts)} attempts the best scores {best.score:.4g} on {', '.join(config.search_tasks)}; the"
        f" numbers that the file had, {first.score:.4g}."
    )
    page.text(
        "How to read it",
        "The best was chosen among many on the same rows, and is too good by chance there. Tasks that were not searched"
        " by say whether the child is better at anything else.",
    )
    so_far, curve = float("-inf"), []
    for number, one in enumerate(config.attempts):
        so_far = max(so_far, one.score)
        curve.append((float(number + 1), so_far))
    page.curves(
        "Best so far",
        {
            "best so far": curve,
            "each attempt": [(float(number + 1), one.score) for number, one in enumerate(config.attempts)],
        },
        x="attempt",
        y="mean score",
    )
    page.table(
        "Numbers",
        ("parameter", "in the file", "best"),
        [(name, f"{first.values[name]:g}", f"{value:g}") for name, value in best.values.items()],
    )
    _describe_scores(config, page)
    page.data = {
        "best": best.model_dump(),
        "attempts": [one.model_dump() for one in config.attempts],
        "scores": config.scores,
        "searched": config.search_tasks,
    }
    return Report(ctx.out, metrics={"score": best.score, "first": first.score, "attempts": len(config.attempts)})


def _describe_scores(config: EvolutionConfig, page: ReportBuilder) -> None:
    """Scores of parents and child, task by task."""
    tasks = list(dict.fromkeys(task for found in config.scores.values() for task in found))
    for task in tasks:
        rows = [
            (model, found[task][0], found[task][1], found[task][2])
            for model, found in config.scores.items()
            if task in found
        ]
        page.intervals(
            f"{task}{'' if task in config.search_tasks else ', not searched by'}",
            rows,
            x=f"score, 95% interval, {config.samples.get(task, 0)} samples",
        )
    page.table(
        "Scores",
        ("model", *tasks),
        [
            (model, *(f"{found[task][0]:.3f}" if task in found else "" for task in tasks))
            for model, found in config.scores.items()
        ],
    )
