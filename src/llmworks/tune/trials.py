"""Stage `tune.trials`: report a hyperparameter sweep: trials, best values and parameter importance.

Does not run recipes or an optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class TrialRecord(Config):
    """One trial of a sweep."""

    number: int = Field(description="trial number")
    values: dict[str, Any] = Field(description="the fields' values")
    score: float | None = Field(None, description="its metric; none if the trial failed")
    error: str = Field("", description="error, where the trial failed")
    seconds: float = Field(0.0, description="duration in seconds")


class TrialsConfig(Config):
    """Trials of a sweep."""

    recipe: str = Field(description="the recipe's name")
    metric: str = Field(description="STEP.METRIC that was optimized")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="direction of the optimization")
    trials: list[TrialRecord] = Field(description="all trials")
    importance: dict[str, float] = Field({}, description="parameter importance: share of the score variance, by field")


def trials(config: TrialsConfig, ctx: Context, results: list[Report | Model | Adapter] | None = None) -> Report:
    """Report the best values, the best score over trials, each field against the score, and every trial.

    `results`: the best trial's results.

    Errors: DataError when no trial has a score.
    """
    scored = [t for t in config.trials if t.score is not None]
    if not scored:
        why = next((t.error for t in config.trials if t.error), "no trial was run")
        raise DataError(f"no trial of {config.recipe} has a score; first error: {why}")
    sign = 1 if config.direction == "maximize" else -1
    best = max(scored, key=lambda t: sign * (t.score or 0.0))
    page = ctx.report
    page.title = f"Sweep of {config.recipe}"
    values = ", ".join(f"{field} {_format_value(value)}" for field, value in best.values.items())
    page.subtitle = f"Best of {len(scored)} trials: {config.metric} {best.score:.4g} with {values}."
    if failed := len(config.trials) - len(scored):
        page.subtitle += f" {failed} failed."
    page.add_text(
        "How to read it",
        "The best score was selected among many on the same rows, so it is biased upward (selection bias). Evaluate the"
        " chosen values on rows that no trial used.",
    )
    page.add_table(
        "Best values", ("field", "value"), [(field, _format_value(value)) for field, value in best.values.items()]
    )
    _draw_best(scored, sign, page, config)
    if config.importance:
        page.add_table(
            "Parameter importance",
            ("field", "share of score variance"),
            sorted(config.importance.items(), key=lambda item: -item[1]),
            "With few trials this is a rough estimate.",
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


def _draw_best(scored: list[TrialRecord], sign: int, page: ReportBuilder, config: TrialsConfig) -> None:
    """Add the best-so-far curve."""
    so_far, curve = None, []
    for t in scored:
        so_far = t.score if so_far is None or sign * (t.score or 0) > sign * so_far else so_far
        curve.append((float(t.number + 1), float(so_far or 0.0)))
    page.add_curves(
        "Best so far",
        {"best so far": curve, "each trial": [(float(t.number + 1), float(t.score or 0.0)) for t in scored]},
        x="trial",
        y=config.metric,
    )


def _draw_fields(best: TrialRecord, scored: list[TrialRecord], page: ReportBuilder, config: TrialsConfig) -> None:
    """Add a plot of each field against the score."""
    for field in best.values:
        numbers = sorted(
            (float(t.values[field]), float(t.score or 0.0))
            for t in scored
            if isinstance(t.values.get(field), (int, float)) and not isinstance(t.values.get(field), bool)
        )
        if len({x for x, _ in numbers}) > 2:
            page.add_curves(f"{field}", {"trials": numbers}, x=field, y=config.metric)


def _describe_trials(best: TrialRecord, config: TrialsConfig, page: ReportBuilder, sign: int) -> None:
    """Add the table of all trials."""
    fields = list(best.values)
    rows = [
        (
            t.number + 1,
            "–" if t.score is None else f"{t.score:.4g}",
            *(_format_value(t.values.get(f)) for f in fields),
            f"{t.seconds:.0f}",
            t.error[:160],
        )
        for t in sorted(config.trials, key=lambda t: -sign * t.score if t.score is not None else float("inf"))
    ]
    page.add_table("All trials", ("trial", config.metric, *fields, "seconds", "error"), rows)


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
