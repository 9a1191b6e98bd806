"""The report of a training: its curves, what it wrote before and after, and what looks wrong. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmworks.core.plots import write_curves
from llmworks.core.report import ReportBuilder

POINTS = 600  # of a curve


def smooth(points: Sequence[tuple[float, float]], width: int = 10) -> list[tuple[float, float]]:
    """Running mean of the last `width` values."""
    return [
        (x, sum(v for _, v in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i, (x, _) in enumerate(points)
    ]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, evenly, the last kept."""
    stride = -(-len(points) // POINTS)
    return [*points[:-1:stride], *points[-1:]] if stride > 1 else list(points)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves as one PNG."""
    steps = [row for row in rows if "loss" in row]
    write_curves(
        [
            (heading, {name: points for name, points in series.items() if points}, "step", y)
            for heading, series, y in plots(steps, rows)
        ],
        path,
    )


def plots(
    steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, list[tuple[float, float]]], str]]:
    """(heading, series over steps, unit) of what is drawn."""
    loss, looks = [(row["step"] + 1, row["loss"]) for row in steps], [row for row in rows if "eval_loss" in row]
    wide = max(2, min(50, len(loss) // 10))
    series = {"loss": thin(loss), f"mean of {wide}": thin(smooth(loss, wide))}
    if looks:
        series["held out"] = [(row["step"] + 1, row["eval_loss"]) for row in looks]
    found = [("Loss", series, "nats per token")]
    for heading, name, y in (
        ("Bits per byte", "bits_per_byte", "bits"),
        ("Accuracy", "accuracy", "share of learned tokens"),
    ):
        if len(looks) > 1 and name in looks[0]:
            found.append((heading, {"held out": [(row["step"] + 1, row[name]) for row in looks]}, y))
    for heading, name, y, factor in (
        ("Gradient norm", "grad_norm", "before clipping", 1.0),
        ("Learning rate", "learning_rate", "", 1.0),
        ("Memory", "memory", "most so far, GB", 1e-9),
    ):
        values = [row[name] * factor for row in steps]
        if name == "memory":  # a process that goes on begins to count anew
            values = list(accumulate(values, max))
        found.append(
            (
                heading,
                {heading.lower(): thin([(row["step"] + 1, value) for row, value in zip(steps, values, strict=True)])},
                y,
            )
        )
    return [
        *found,
        (
            "Speed",
            {
                "mean of 10": thin(
                    smooth([(row["step"] + 1, row["tokens"] / max(row["seconds"], 1e-9)) for row in steps])
                )
            },
            "tokens per second",
        ),
    ]


def draw(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    vocabulary: int = 0,
) -> list[str]:
    """Fill the report from the metrics of all steps, and the figures of the whole; returns warnings."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    loss = [(row["step"] + 1, row["loss"]) for row in steps]
    warnings: list[str] = []
    if len(loss) >= 20 and smooth(loss)[-1][1] >= smooth(loss)[9][1]:
        warnings.append("the loss did not fall")
    if metrics.get("perplexity", 0) > vocabulary > 0:
        warnings.append(f"the model is worse than a guess among its {vocabulary:,} tokens")
    if any(before) and list(before) == list(after):
        warnings.append("nothing changed: it writes what it wrote before training")
    if any(before) and not any(text.strip() for text in after):
        warnings.append("it writes nothing")
    tokens = sum(row["tokens"] for row in steps)
    report.title = f"Training of {title}"
    report.lead = (
        f"{len(steps):,} steps, {tokens:,} tokens; from the first tenth of them to the last the loss went from"
        f" {metrics['loss_first']:.3f} to {metrics['loss']:.3f} nats a token."
        if loss
        else ""
    )
    if "bits_per_byte" in metrics:
        report.lead += (
            f" All held-out tokens: {metrics['bits_per_byte']:.4f} bits per byte, perplexity"
            f" {metrics['perplexity']:,.1f}."
        )
    report.data = {
        "steps": len(steps),
        "tokens": tokens,
        "warnings": warnings,
        "evaluations": [{"step": row["step"] + 1, "bits_per_byte": row["bits_per_byte"]} for row in looks],
    }
    if warnings:
        report.text("Warnings", "\n\n".join(warnings))
    notes = {"Bits per byte": "Of the part of the held-out tokens that is looked at on the way."}
    for heading, series, y in plots(steps, rows):
        report.curves(heading, series, x="step", y=y, note=notes.get(heading, ""))
    if any(after):
        report.samples(
            "What it writes",
            [{"": prompt, "before": b, "after": a} for prompt, b, a in zip(prompts, before, after, strict=True)],
            note="At temperature 0.8, the same draws before and after.",
        )
    return warnings
