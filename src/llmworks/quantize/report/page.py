"""Report of a quantization: error of each layer, and the model's divergence. Does not know tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.report import ReportBuilder

INPUT_NAMES = {
    "attention.query": "queries, keys, values",
    "attention.out": "attention output",
    "feed_forward.gate": "gate and up",
    "feed_forward.up": "up",
    "feed_forward.down": "down",
}

METRIC_DESCRIPTIONS = {
    "bytes": "size of the weight files",
    "bits_per_weight": "bits per quantized weight, scales included",
    "quantized_weights": "number of quantized weights",
    "weights": "number of weights",
    "fallback_tensors": "tensors in a fallback format, because the block size does not divide their rows",
    "kl": "KL divergence from the original model, nats per token, on held-out sequences",
    "expected_kl": "the same, as predicted by the bit allocation",
    "top1_agreement": "top-1 agreement: fraction of tokens with the same most probable token",
    "original_perplexity": "of the original model, on the same sequences",
    "perplexity": "of the quantized model",
    "eval_tokens": "number of held-out tokens",
    "layers": "layers that the adapter changes",
    "logprob_gap": "mean log-probability gap between llama.cpp and the merged model, nats, on golden tokens",
    "greedy_agreement": "top-1 agreement with the merged model on golden tokens",
    "golden_gap_mean": "mean change of the golden conversations' logits",
    "golden_gap_max": "largest change of the golden conversations' logits",
    "golden_greedy_agreement": "top-1 agreement on golden tokens",
}


def add_metrics_table(report: ReportBuilder, metrics: Mapping[str, Any]) -> None:
    """Add the table of all metrics, with their meaning."""
    report.add_table(
        "Metrics",
        ("metric", "value", "meaning"),
        [(name, value, METRIC_DESCRIPTIONS.get(name, "")) for name, value in metrics.items()],
    )


def write_report(
    report: ReportBuilder,
    title: str,
    method: str,
    layer_stats: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    original_bytes: int,
) -> None:
    """Write the report: metrics, curves over the blocks, and the layers with the largest error."""
    report.title = f"{title} quantized by {method}"
    report.subtitle = (
        f"{metrics['bytes'] / 1e6:,.1f} MB of {original_bytes / 1e6:,.1f}; {metrics['quantized_weights']:,} weights at"
        f" {metrics['bits_per_weight']:.2f} bits per weight."
    )
    if "kl" in metrics:
        report.subtitle += (
            f" On {metrics['eval_tokens']:,.0f} held-out tokens the KL divergence from the original model is"
            f" {metrics['kl']:.4f} nats per token; top-1 agreement {metrics['top1_agreement']:.1%}; perplexity"
            f" {metrics['original_perplexity']:.3f} before, {metrics['perplexity']:.3f} after."
        )
    report.data = {
        "metrics": dict(metrics),
        "layers": [{key: one[key] for key in ("name", "lost", "bits")} for one in layer_stats],
    }
    _draw_curves(layer_stats, report)
    worst = sorted(layer_stats, key=lambda one: -float(one["lost"]))
    _draw_extremes(worst, report)
    if len({round(float(one["bits"]), 1) for one in layer_stats}) > 1:
        bits: dict[str, list[tuple[float, float]]] = {}
        for one in layer_stats:
            bits.setdefault(str(one["layer"]), []).append((float(one["block"]), float(one["bits"])))
        report.add_curves(
            "Bits per weight",
            bits,
            x="block",
            y="bits, scales included",
            note="More where rounding would change the model's token probabilities most.",
        )
    add_metrics_table(report, metrics)
    report.add_table(
        "Layers with the largest error",
        ("layer", "relative squared error", "bits per weight"),
        [(one["name"], round(float(one["lost"]), 5), round(float(one["bits"]), 3)) for one in worst[:12]],
    )


def _draw_curves(layer_stats: Sequence[Mapping[str, Any]], report: ReportBuilder) -> None:
    """Draw curves over the blocks: quantization error, and activation outliers."""
    series: dict[str, list[tuple[float, float]]] = {}
    for one in layer_stats:
        series.setdefault(str(one["layer"]), []).append((float(one["block"]), float(one["lost"])))
    report.add_curves(
        "Quantization error of the weights",
        series,
        x="block",
        y="relative squared error",
        note="By layer. The effect on the model also depends on the layers' inputs.",
    )
    outliers: dict[str, list[tuple[float, float]]] = {}
    for one in layer_stats:
        if one.get("apart"):
            outliers.setdefault(INPUT_NAMES[str(one["layer"])], []).append((float(one["block"]), float(one["apart"])))
    if outliers:
        report.add_curves(
            "Activation outliers: ratio of the largest input column to the median",
            outliers,
            x="block",
            y="ratio",
            note=(
                "Inputs concentrated in a few columns suffer most from rounding; AWQ, SmoothQuant and rotations"
                " address them."
            ),
        )


def _draw_extremes(worst: list[Mapping[str, Any]], report: ReportBuilder) -> None:
    """Draw histograms of the layers with the largest and smallest error."""
    for one in (worst[0], worst[-1]) if worst else ():
        shape = one["shape"]
        step = (shape["high"] - shape["low"]) / len(shape["before"])
        series = {
            when: [(shape["low"] + step * (at + 0.5), float(count)) for at, count in enumerate(shape[when])]
            for when in ("before", "after")
        }
        report.add_curves(
            f"Weights of {one['name']}, {'largest' if one is worst[0] else 'smallest'} error",
            series,
            x="weight",
            y="count",
            note=(
                "Of evenly sampled rows, within five times their root mean square. Weights are integers times a"
                " scale; where groups have separate scales the steps blur."
            ),
        )
