"""The training report: curves, samples before and after, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmworks.core.plots import write_curves
from llmworks.core.report import ReportBuilder

POINTS = 600  # per curve, at most


def smooth(points: Sequence[tuple[float, float]], width: int = 10) -> list[tuple[float, float]]:
    """Compute the running mean of the last `width` values."""
    return [
        (x, sum(v for _, v in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i, (x, _) in enumerate(points)
    ]


def subsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Subsample evenly to about POINTS points; the last one is kept."""
    stride = -(-len(points) // POINTS)
    return [*points[:-1:stride], *points[-1:]] if stride > 1 else list(points)


def save_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the curves as one PNG."""
    steps = [row for row in rows if "loss" in row]
    write_curves(
        [
            (heading, {name: points for name, points in series.items() if points}, "step", y)
            for heading, series, y in build_plots(steps, rows)
        ],
        path,
    )


def build_plots(
    steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, list[tuple[float, float]]], str]]:
    """Return (heading, series over steps, y label) of each plot."""
    loss, evaluations = [(row["step"] + 1, row["loss"]) for row in steps], [row for row in rows if "eval_loss" in row]
    window = max(2, min(50, len(loss) // 10))
    series = {"loss": subsample(loss), f"mean of {window}": subsample(smooth(loss, window))}
    if evaluations:
        series["held out"] = [(row["step"] + 1, row["eval_loss"]) for row in evaluations]
    curves = [("Loss", series, "nats per token")]
    for heading, name, y in (
        ("Bits per byte", "bits_per_byte", "bits"),
        ("Accuracy", "accuracy", "share of label tokens"),
    ):
        if len(evaluations) > 1 and name in evaluations[0]:
            curves.append((heading, {"held out": [(row["step"] + 1, row[name]) for row in evaluations]}, y))
    for heading, name, y, factor in (
        ("Gradient norm", "grad_norm", "before clipping", 1.0),
        ("Learning rate", "learning_rate", "", 1.0),
        ("Memory", "peak_memory", "peak so far, GB", 1e-9),
    ):
        values = [row[name] * factor for row in steps]
        if name == "peak_memory":  # a resumed process starts counting again
            values = list(accumulate(values, max))
        curves.append(
            (
                heading,
                {
                    heading.lower(): subsample(
                        [(row["step"] + 1, value) for row, value in zip(steps, values, strict=True)]
                    )
                },
                y,
            )
        )
    return [
        *curves,
        (
            "Speed",
            {
                "mean of 10": subsample(
                    smooth([(row["step"] + 1, row["tokens"] / max(row["seconds"], 1e-9)) for row in steps])
                )
            },
            "tokens per second",
        ),
    ]


def write_report(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    vocabulary: int = 0,
) -> list[str]:
    """Fill the report from the metrics of all steps and the final metrics; return warnings."""
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    loss = [(row["step"] + 1, row["loss"]) for row in steps]
    warnings: list[str] = []
    if len(loss) >= 20 and smooth(loss)[-1][1] >= smooth(loss)[9][1]:
        warnings.append("the loss did not decrease")
    if metrics.get("perplexity", 0) > vocabulary > 0:
        warnings.append(f"perplexity is above the vocabulary size {vocabulary:,}: worse than uniform guessing")
    if any(before) and list(before) == list(after):
        warnings.append("nothing changed: the samples are the same as before training")
    if any(before) and not any(text.strip() for text in after):
        warnings.append("all samples are empty")
    tokens = sum(row["tokens"] for row in steps)
    report.title = f"Training of {title}"
    report.subtitle = (
        f"{len(steps):,} steps, {tokens:,} tokens; mean loss went from {metrics['initial_loss']:.3f} (first tenth of"
        f" the steps) to {metrics['loss']:.3f} nats per token (last tenth)."
        if loss
        else ""
    )
    if "bits_per_byte" in metrics:
        report.subtitle += (
            f" All held-out tokens: {metrics['bits_per_byte']:.4f} bits per byte,"
            f" perplexity {metrics['perplexity']:,.1f}."
        )
    report.data = {
        "steps": len(steps),
        "tokens": tokens,
        "warnings": warnings,
        "evaluations": [{"step": row["step"] + 1, "bits_per_byte": row["bits_per_byte"]} for row in evaluations],
    }
    if warnings:
        report.add_text("Warnings", "\n\n".join(warnings))
    notes = {"Bits per byte": "On the eval_samples held-out rows evaluated during training."}
    for heading, series, y in build_plots(steps, rows):
        report.add_curves(heading, series, x="step", y=y, note=notes.get(heading, ""))
    if any(after):
        report.add_samples(
            "Samples",
            [{"": prompt, "before": b, "after": a} for prompt, b, a in zip(prompts, before, after, strict=True)],
            note="Sampled at temperature 0.8 with the same seed before and after.",
        )
    return warnings
