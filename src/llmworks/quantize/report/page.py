"""The report of a quantization: what each layer lost, and what the model is worth after it. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.report import ReportBuilder

READ = {
    "attention.query": "queries, keys, values",
    "attention.out": "output of attention",
    "feed_forward.gate": "gate and up",
    "feed_forward.up": "up",
    "feed_forward.down": "down",
}

MEANS = {
    "bytes": "of the weights' files",
    "bits_per_weight": "of what was quantized, scales included",
    "quantized_weights": "how many are whole numbers now",
    "weights": "how many there are",
    "fallen": "tensors in a neighbouring format, since blocks do not divide their rows",
    "kl": "divergence from the model as it was, nats a token, on texts apart",
    "expected_kl": "the same, as the allocation foresaw it",
    "top1_agreement": "share of tokens for which its best guess is the same",
    "perplexity_before": "of the model as it was, on the same texts",
    "perplexity": "of this one",
    "eval_tokens": "of the texts apart",
    "layers": "that the adapter changes",
    "gap": "how far what llama.cpp says is from the folded model, nats, on golden tokens",
    "greedy_agreement": "share of golden tokens for which its best guess is the folded model's",
    "golden_gap_mean": "how far the logits of the golden conversations moved, on average",
    "golden_gap_largest": "at most",
    "golden_greedy_agreement": "share of golden tokens for which its best guess is the same",
}


def figures(report: ReportBuilder, metrics: Mapping[str, Any]) -> None:
    """The table of all figures, with what they mean."""
    report.table(
        "Figures",
        ("figure", "value", "what it is"),
        [(name, value, MEANS.get(name, "")) for name, value in metrics.items()],
    )


def describe(
    report: ReportBuilder,
    title: str,
    method: str,
    told: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    before: int,
) -> None:
    """Figures, curves over the blocks, and the layers that lost most."""
    report.title = f"{title} quantized by {method}"
    report.lead = (
        f"{metrics['bytes'] / 1e6:,.1f} MB of {before / 1e6:,.1f}; {metrics['quantized_weights']:,} weights in"
        f" {metrics['bits_per_weight']:.2f} bits each."
    )
    if "kl" in metrics:
        report.lead += (
            f" On {metrics['eval_tokens']:,.0f} tokens apart it is {metrics['kl']:.4f} nats a token away from the model"
            f" as it was; its best guess is the same for {metrics['top1_agreement']:.1%} of them; perplexity"
            f" {metrics['perplexity_before']:.3f} before, {metrics['perplexity']:.3f} after."
        )
    report.data = {
        "metrics": dict(metrics),
        "layers": [{key: one[key] for key in ("name", "lost", "bits")} for one in told],
    }
    _draw_curves(told, report)
    worst = sorted(told, key=lambda one: -float(one["lost"]))
    _draw_extremes(worst, report)
    if len({round(float(one["bits"]), 1) for one in told}) > 1:
        bits: dict[str, list[tuple[float, float]]] = {}
        for one in told:
            bits.setdefault(str(one["layer"]), []).append((float(one["block"]), float(one["bits"])))
        report.curves(
            "Bits of a weight",
            bits,
            x="block",
            y="bits, scales included",
            note="More where a rounding would change the model's chances of tokens most.",
        )
    figures(report, metrics)
    report.table(
        "Layers that lost most",
        ("layer", "share lost", "bits a weight"),
        [(one["name"], round(float(one["lost"]), 5), round(float(one["bits"]), 3)) for one in worst[:12]],
    )


def _draw_curves(told: Sequence[Mapping[str, Any]], report: ReportBuilder) -> None:
    """Curves over the blocks: what rounding takes, and outliers of inputs."""
    series: dict[str, list[tuple[float, float]]] = {}
    for one in told:
        series.setdefault(str(one["layer"]), []).append((float(one["block"]), float(one["lost"])))
    report.curves(
        "What rounding takes from the weights",
        series,
        x="block",
        y="share of their squares",
        note="By layer. What it takes from the model depends on what the layers read, too.",
    )
    outliers: dict[str, list[tuple[float, float]]] = {}
    for one in told:
        if one.get("apart"):
            outliers.setdefault(READ[str(one["layer"])], []).append((float(one["block"]), float(one["apart"])))
    if outliers:
        report.curves(
            "Outliers: how many times the largest column of inputs is the median one",
            outliers,
            x="block",
            y="times",
            note=(
                "What is read in few columns only is what rounding hurts most, and what AWQ, SmoothQuant and rotations"
                " look at."
            ),
        )


def _draw_extremes(worst: list[Mapping[str, Any]], report: ReportBuilder) -> None:
    """Histograms of the layers that lost most and least."""
    for one in (worst[0], worst[-1]) if worst else ():
        shape = one["shape"]
        step = (shape["high"] - shape["low"]) / len(shape["before"])
        series = {
            when: [(shape["low"] + step * (at + 0.5), float(count)) for at, count in enumerate(shape[when])]
            for when in ("before", "after")
        }
        report.curves(
            f"Weights of {one['name']}, which lost {'most' if one is worst[0] else 'least'}",
            series,
            x="weight",
            y="how many",
            note=(
                "Of rows evenly taken, within five times their root mean square. They are whole numbers times a scale:"
                " where groups have scales of their own the steps blur."
            ),
        )
