"""Stage `tune.evolution`: report a search over merge parameters: best-so-far curve, best values, and the scores of
parents and child on searched and held-out tasks.

Does not run an optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class CandidateRecord(Config):
    """One evaluated candidate."""

    generation: int = Field(description="generation; 0: the initial values from the file")
    values: dict[str, float] = Field(description="parameter values")
    score: float = Field(description="mean score over the search tasks (fitness)")
    parts: dict[str, float] = Field({}, description="scores by task")


class EvolutionConfig(Config):
    """Candidates and scores of a search."""

    merge: str = Field(description="name of the merge")
    attempts: list[CandidateRecord] = Field(min_length=1, description="all candidates, in order")
    search_tasks: list[str] = Field(description="tasks that the search optimized")
    scores: dict[str, dict[str, list[float]]] = Field(
        {}, description="by model and task: score, low and high of its interval"
    )
    samples: dict[str, int] = Field({}, description="number of samples by task")


def evolution(
    config: EvolutionConfig, ctx: Context, models: list[Model] | None = None, reports: list[Report] | None = None
) -> Report:
    """Report the curve, the best values and the scores.

    `models`: the best child, then its parents; `reports`: their evaluations.
    """
    best = max(config.attempts, key=lambda one: one.score)
    first = config.attempts[0]
    page = ctx.report
    page.title = f"Evolutionary merge of {config.merge}"
    page.subtitle = (
        f"The best of {len(config.attempts)} candidates scores {best.score:.4g} on {', '.join(config.search_tasks)};"
        f" the file's initial values score {first.score:.4g}."
    )
    page.add_text(
        "How to read it",
        "The best candidate was selected among many on the same rows, so its score there is biased upward (selection"
        " bias). Held-out tasks show whether the child is better in general.",
    )
    so_far, curve = float("-inf"), []
    for number, one in enumerate(config.attempts):
        so_far = max(so_far, one.score)
        curve.append((float(number + 1), so_far))
    page.add_curves(
        "Best so far",
        {
            "best so far": curve,
            "each candidate": [(float(number + 1), one.score) for number, one in enumerate(config.attempts)],
        },
        x="candidate",
        y="mean score",
    )
    page.add_table(
        "Parameters",
        ("parameter", "initial", "best"),
        [(name, f"{first.values[name]:g}", f"{value:g}") for name, value in best.values.items()],
    )
    _describe_scores(config, page)
    page.data = {
        "best": best.model_dump(),
        "attempts": [one.model_dump() for one in config.attempts],
        "scores": config.scores,
        "searched": config.search_tasks,
    }
    metrics = {"score": best.score, "initial_score": first.score, "attempts": len(config.attempts)}
    return Report(ctx.out, metrics=metrics)


def _describe_scores(config: EvolutionConfig, page: ReportBuilder) -> None:
    """Add the scores of parents and child by task."""
    tasks = list(dict.fromkeys(task for found in config.scores.values() for task in found))
    for task in tasks:
        rows = [
            (model, found[task][0], found[task][1], found[task][2])
            for model, found in config.scores.items()
            if task in found
        ]
        page.add_intervals(
            f"{task}{'' if task in config.search_tasks else ', held-out'}",
            rows,
            x=f"score, 95% interval, {config.samples.get(task, 0)} samples",
        )
    page.add_table(
        "Scores",
        ("model", *tasks),
        [
            (model, *(f"{found[task][0]:.3f}" if task in found else "" for task in tasks))
            for model, found in config.scores.items()
        ],
    )
