"""Stage `tune.trials`: the page of a sweep: what was tried, what came of it, which fields mattered.

Knows no recipe and no optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class Tried(Config):
    """One trial."""

    number: int = Field(description="its number")
    values: dict[str, Any] = Field(description="the fields that were set")
    score: float | None = Field(None, description="its metric, if it came so far")
    error: str = Field("", description="why it has none")
    seconds: float = Field(0.0, description="how long it took")


class TrialsConfig(Config):
    """What was tried."""

    recipe: str = Field(description="the recipe's name")
    metric: str = Field(description="STEP.METRIC that was to be best")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="whether more is better")
    trials: list[Tried] = Field(description="all trials")
    importance: dict[str, float] = Field({}, description="by field, its share in what scores differ by")


def trials(config: TrialsConfig, ctx: Context, results: list[Report | Model | Adapter] | None = None) -> Report:
    """The best values, the best score over trials, each field against the score, and every trial.

    `results`: what the trials' step made.

    Errors: DataError when no trial has a score.
    """
    scored = [t for t in config.trials if t.score is not None]
    if not scored:
        why = next((t.error for t in config.trials if t.error), "none was tried")
        raise DataError(f"no trial of {config.recipe} has a score; the first: {why}")
    sign = 1 if config.direction == "maximize" else -1
    best = max(scored, key=lambda t: sign * (t.score or 0.0))
    page = ctx.report
    page.title = f"Sweep of {config.recipe}"
    values = ", ".join(f"{field} {_told(value)}" for field, value in best.values.items())
    page.lead = f"Best of {len(scored)} trials: {config.metric} {best.score:.4g} with {values}."
    if failed := len(config.trials) - len(scored):
        page.lead += f" {failed} came to no score."
    page.text(
        "How to read it",
        "The best score was chosen among many, on the same rows: it is too good by chance. Measure what is chosen on"
        " rows that no trial has seen.",
    )
    page.table("What to set", ("field", "value"), [(field, _told(value)) for field, value in best.values.items()])
    _draw_best(scored, sign, page, config)
    if config.importance:
        page.table(
            "Which fields mattered",
            ("field", "share of what scores differ by"),
            sorted(config.importance.items(), key=lambda item: -item[1]),
            "Of few trials this is a rough guess.",
        )
    _draw_fields(best, scored, page, config)
    _describe_trials(best, config, page, sign)
    metrics: dict[str, Any] = {
        "score": best.score,
        "trials": len(config.trials),
        "failed": len(config.trials) - len(scored),
    }
    page.data = {
        "best": best.values,
        "metrics": metrics,
        "trials": [t.model_dump() for t in config.trials],
        "importance": config.importance,
    }
    return Report(ctx.out, metrics=metrics)


def _draw_best(scored: list[Tried], sign: int, page: ReportBuilder, config: TrialsConfig) -> None:
    """The best score over trials."""
    so_far, curve = None, []
    for t in scored:
        so_far = t.score if so_far is None or sign * (t.score or 0) > sign * so_far else so_far
        curve.append((float(t.number + 1), float(so_far or 0.0)))
    page.curves(
        "Best so far",
        {"best so far": curve, "each trial": [(float(t.number + 1), float(t.score or 0.0)) for t in scored]},
        x="trial",
        y=config.metric,
    )


def _draw_fields(best: Tried, scored: list[Tried], page: ReportBuilder, config: TrialsConfig) -> None:
    """Each field against the score."""
    for field in best.values:
        numbers = sorted(
            (float(t.values[field]), float(t.score or 0.0))
            for t in scored
            if isinstance(t.values.get(field), (int, float)) and not isinstance(t.values.get(field), bool)
        )
        if len({x for x, _ in numbers}) > 2:
            page.curves(f"{field}", {"trials": numbers}, x=field, y=config.metric)


def _describe_trials(best: Tried, config: TrialsConfig, page: ReportBuilder, sign: int) -> None:
    """The table of all trials."""
    fields = list(best.values)
    rows = [
        (
            t.number + 1,
            "–" if t.score is None else f"{t.score:.4g}",
            *(_told(t.values.get(f)) for f in fields),
            f"{t.seconds:.0f}",
            t.error[:160],
        )
        for t in sorted(config.trials, key=lambda t: -sign * t.score if t.score is not None else float("inf"))
    ]
    page.table("All trials", ("trial", config.metric, *fields, "seconds", "why not"), rows)


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
