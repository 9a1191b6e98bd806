"""Stage `train.compare`: compare finished trainings: bits per byte at equal tokens and at equal time.

Reads the saved metrics of models from `train.pretrain` and `train.ngram`; runs no model.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

Points = Sequence[tuple[float, float]]


class TrainingCompareConfig(Config):
    """The baseline of the comparison."""

    baseline: str = Field(
        "", description="name of the model that is compared with the best of the others; default: the first one"
    )


@dataclass(frozen=True)
class TrainingHistory:
    """One training: bits per byte over tokens and over training seconds, and the final metrics."""

    by_tokens: Points
    by_seconds: Points
    parameters: int
    tokens: int
    bits_per_byte: float
    perplexity: float


def compare(config: TrainingCompareConfig, models: dict[str, Model], ctx: Context) -> Report:
    """Compare trainings in a table and curves. They need the same held-out tokens.

    Errors: UserError for fewer than two models, or an unknown baseline; DataError for a model without eval metrics, or
    with another eval set.
    """
    if len(models) < 2:
        raise UserError("compare needs at least two models; name each: --models NAME=REF")
    baseline = config.baseline or next(iter(models))
    if baseline not in models:
        raise UserError(f"config.baseline is {baseline!r}; the models are {', '.join(models)}")
    runs = {name: read_history(name, model) for name, model in models.items()}
    eval_digests = {
        name: tuple(p.digest for p in model.manifest.parents if p.role in ("eval_data", "held_out"))
        if model.manifest
        else ()
        for name, model in models.items()
    }
    other = next((name for name in models if eval_digests[name] != eval_digests[baseline]), None)
    if other is not None:
        raise DataError(
            f"{other} and {baseline} were not evaluated on the same held-out tokens, so their metrics cannot be"
            " compared"
        )
    trained = {name: run for name, run in runs.items() if len(run.by_tokens) > 1}
    tokens, seconds = (
        min((points[-1][0] for points in (getattr(run, kind) for run in trained.values())), default=0.0)
        for kind in ("by_tokens", "by_seconds")
    )
    rows = _build_rows(runs, trained, tokens, seconds)
    report = ctx.report
    report.title = f"Comparison of {len(runs)} trainings"
    best = min(runs, key=lambda name: runs[name].bits_per_byte)
    report.subtitle = (
        f"Best final result: {best} with {runs[best].bits_per_byte:.4f} bits per byte."
        + describe_crossing(baseline, trained)
    )
    _describe_figures(report, tokens, seconds, rows)
    _draw_curves(trained, runs, report)
    report.data = {
        "models": {
            name: {"bits_per_byte": run.bits_per_byte, "parameters": run.parameters, "tokens": run.tokens}
            for name, run in runs.items()
        },
        "equal_tokens": tokens,
        "equal_seconds": seconds,
    }
    others = [run.bits_per_byte for name, run in runs.items() if name != baseline]
    ctx.progress.log(report.subtitle)
    return Report(
        ctx.out,
        metrics={
            "bits_per_byte": runs[baseline].bits_per_byte,
            "best_other": min(others),
            "improvement": round(min(others) - runs[baseline].bits_per_byte, 5),
        },
    )


def _build_rows(
    runs: dict[str, TrainingHistory], trained: dict[str, TrainingHistory], tokens: Any | float, seconds: Any | float
) -> list[tuple[str, int | None, int, float | None, float | None, float | None, float, float]]:
    """Return a table row for each run."""
    rows = []
    for name, run in runs.items():
        equal = (
            (interpolate(run.by_tokens, tokens), interpolate(run.by_seconds, seconds))
            if name in trained
            else (None, None)
        )
        rows.append(
            (
                name,
                run.parameters or None,
                run.tokens,
                run.by_seconds[-1][0] if name in trained else None,
                *equal,
                run.bits_per_byte,
                run.perplexity,
            )
        )
    return rows


def _describe_figures(
    report: ReportBuilder,
    tokens: Any | float,
    seconds: Any | float,
    rows: list[tuple[str, int | None, int, float | None, float | None, float | None, float, float]],
) -> None:
    """Add the table of metrics."""
    report.add_table(
        "Metrics",
        (
            "model",
            "parameters",
            "tokens",
            "seconds",
            f"bits per byte at {tokens:,.0f} tokens",
            f"at {seconds:,.0f} s",
            "final, all held-out tokens",
            "perplexity",
        ),
        rows,
        note=(
            "Curves and values at equal tokens and time are from evaluations during training on eval_samples rows;"
            " values between evaluations are interpolated linearly."
        ),
    )


def _draw_curves(trained: dict[str, TrainingHistory], runs: dict[str, TrainingHistory], report: ReportBuilder) -> None:
    """Add curves of bits per byte over tokens and over time."""
    for heading, kind, x in (
        ("Bits per byte over tokens", "by_tokens", "tokens"),
        ("Bits per byte over time", "by_seconds", "seconds of training"),
    ):
        series = {name: getattr(run, kind) for name, run in trained.items()}
        if series:
            last = max(points[-1][0] for points in series.values())
            flat = {
                name: [(0.0, run.bits_per_byte), (last, run.bits_per_byte)]
                for name, run in runs.items()
                if name not in trained
            }
            report.add_curves(
                heading,
                {**series, **flat},
                x=x,
                y="bits",
                note=(
                    "Flat lines (n-gram models) are on all held-out tokens; the other curves are on the"
                    " eval_samples rows evaluated during training."
                    if flat
                    else ""
                ),
            )


def read_history(name: str, model: Model) -> TrainingHistory:
    """Read the saved metrics of a training. DataError without eval metrics."""
    if "bits_per_byte" not in model.metrics:
        raise DataError(f"{name}: has no eval metrics; train it with eval_data (--eval-data)")
    file = model.path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    steps = [row for row in rows if "loss" in row]
    place = {row["step"]: i for i, row in enumerate(steps)}
    tokens, seconds = (list(accumulate(row[key] for row in steps)) for key in ("tokens", "seconds"))
    evaluations = [(place[row["step"]], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    return TrainingHistory(
        [(tokens[i], bits) for i, bits in evaluations],
        [(seconds[i], bits) for i, bits in evaluations],
        int(model.metrics.get("parameters", 0)),
        int(model.metrics.get("tokens", 0)),
        float(model.metrics["bits_per_byte"]),
        float(model.metrics["perplexity"]),
    )


def interpolate(points: Points, x: float) -> float | None:
    """Interpolate linearly at x: the first value before all points, None after the last."""
    if not points or x > points[-1][0]:
        return None
    i = bisect_left([p for p, _ in points], x)
    if i == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def describe_crossing(baseline: str, trained: dict[str, TrainingHistory]) -> str:
    """Say from which time on the baseline is better than every other training."""
    others = {name: run for name, run in trained.items() if name != baseline}
    if baseline not in trained or not others:
        return ""
    own = trained[baseline].by_seconds
    since: float | None = None
    for x, y in own:
        best = min(
            (
                value
                for run in others.values()
                if (value := interpolate(run.by_seconds, x) if x <= run.by_seconds[-1][0] else run.by_seconds[-1][1])
                is not None
            ),
            default=float("inf"),
        )
        since = None if y > best else x if since is None else since
    if since is None:
        return f" At equal time {baseline} is never the best trained model."
    return f" At equal time {baseline} is the best trained model" + (
        " from the first evaluation on." if since == own[0][0] else f" from {since:,.0f} s on."
    )
