"""The report of a training: its curves, what it wrote before and after, and what looks wrong. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.report import ReportBuilder

POINTS = 600  # of a curve


def smooth(points: Sequence[tuple[float, float]], width: int = 10) -> list[tuple[float, float]]:
    """Running mean of the last `width` values."""
    return [(x, sum(v for _, v in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width)) for i, (x, _) in enumerate(points)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, evenly, the last kept."""
    stride = -(-len(points) // POINTS)
    return [*points[:-1:stride], *points[-1:]] if stride > 1 else list(points)


def draw(report: ReportBuilder, title: str, rows: Sequence[dict[str, Any]], prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Fill the report from the metrics of all steps; returns warnings."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "held_out" in row]
    loss = [(row["step"] + 1, row["loss"]) for row in steps]
    warnings: list[str] = []
    if len(loss) >= 20 and smooth(loss)[-1][1] >= smooth(loss)[9][1]:
        warnings.append("the loss did not fall")
    if any(before) and list(before) == list(after):
        warnings.append("nothing changed: it writes what it wrote before training")
    if any(before) and not any(text.strip() for text in after):
        warnings.append("it writes nothing")
    tokens = sum(row["tokens"] for row in steps)
    report.title = f"Training of {title}"
    report.lead = f"{len(steps):,} steps, {tokens:,} tokens; the loss fell from {loss[0][1]:.3f} to {smooth(loss)[-1][1]:.3f} nats a token." if loss else ""
    if looks:
        report.lead += f" Held out: {looks[-1]['bits_per_byte']:.4f} bits per byte, perplexity {looks[-1]['perplexity']:,.1f}."
    report.data = {"steps": len(steps), "tokens": tokens, "warnings": warnings, "held_out": [{"step": row["step"] + 1, "bits_per_byte": row["bits_per_byte"]} for row in looks]}
    if warnings:
        report.text("Warnings", "\n\n".join(warnings))
    series = {"loss": thin(loss), "mean of 50": thin(smooth(loss, 50))}
    if looks:
        series["held out"] = [(row["step"] + 1, row["held_out"]) for row in looks]
    report.curves("Loss", series, x="step", y="nats per token")
    if looks:
        report.curves("Bits per byte", {"held out": [(row["step"] + 1, row["bits_per_byte"]) for row in looks]}, x="step", y="bits")
    for heading, name, y, factor in (("Gradient norm", "gradient_norm", "before clipping", 1.0), ("Learning rate", "learning_rate", "", 1.0), ("Memory", "memory", "most so far, GB", 1e-9)):
        report.curves(heading, {heading.lower(): thin([(row["step"] + 1, row[name] * factor) for row in steps])}, x="step", y=y)
    report.curves("Speed", {"mean of 10": thin(smooth([(row["step"] + 1, row["tokens"] / max(row["seconds"], 1e-9)) for row in steps]))}, x="step", y="tokens per second")
    if any(after):
        report.samples("What it writes", [{"": prompt, "before": b, "after": a} for prompt, b, a in zip(prompts, before, after, strict=True)], note="At temperature 0.8, the same draws before and after.")
    return warnings
