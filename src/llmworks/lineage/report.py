"""Stage `lineage.report`: write one page on how a family of artifacts was made and how good it is.

Reads only what artifacts carry: manifests, metric logs, evaluation and comparison reports. Does not load models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Artifact, Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.report import ReportBuilder
from llmworks.lineage.drawing.formats import draw_svg, draw_text
from llmworks.lineage.family import build_family


class StoryConfig(Config):
    """Title and samples of the page."""

    title: str = Field("Report", description="title of the page")
    subtitle: str = Field("", description="subtitle, one sentence")
    num_samples: int = Field(12, ge=0, description="number of questions shown with every evaluation's answer")


def report(config: StoryConfig, artifacts: list[Model | Adapter | Dataset | Report], ctx: Context) -> Report:
    """Write family tree, training curves, scores with intervals, comparisons, samples, sizes and speeds."""
    page = ctx.report
    page.title, page.subtitle = config.title, config.subtitle
    evaluations = [(a, a.read()) for a in artifacts if isinstance(a, Report) and "score" in a.metrics]
    comparisons = [(a, a.read()) for a in artifacts if isinstance(a, Report) and "difference" in a.metrics]
    add_scores(page, evaluations)
    if comparisons:
        rows = [
            (
                d["before"],
                d["after"],
                f"{m['difference']:{form}}",
                f"{m['low']:{form}} to {m['high']:{form}}",
                m["gained"],
                m["lost"],
                d["verdict"],
            )
            for a, d in comparisons
            for m, form in [(a.metrics, "+.1%" if d.get("percent", True) else "+.4g")]
        ]
        page.add_table(
            "Paired comparisons",
            ("before", "after", "difference", "95% interval", "gained", "lost", "verdict"),
            rows,
            "Paired bootstrap over the same samples.",
        )
    add_forgetting(page, artifacts)
    add_curves(page, artifacts)
    add_samples(page, evaluations, config.num_samples)
    add_sizes(page, artifacts)
    family = build_family(artifacts, {a.name: a for a in artifacts})
    page.add_drawing(
        "Family tree",
        draw_svg(family),
        "Solid edges can be reproduced byte for byte (llmworks verify), dashed ones are declared.",
        draw_text(family),
    )
    add_machine(page, artifacts)
    page.data = {
        "scores": {
            a.name: {k: a.metrics[k] for k in ("score", "low", "high", "samples") if k in a.metrics}
            for a, _ in evaluations
        },
        "comparisons": {
            a.name: {k: a.metrics[k] for k in ("difference", "low", "high", "p_not_better", "p_not_worse")}
            for a, _ in comparisons
        },
        "sizes": {a.name: compute_size(a) for a in artifacts if isinstance(a, (Model, Adapter))},
    }
    return Report(ctx.out, metrics={"artifacts": len(artifacts), "evaluations": len(evaluations)})


Evaluation = tuple[Report, dict[str, Any]]


def group_by_task(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """Group evaluations by task; a report with a score but without a task (a judge's) by its stage."""
    groups: dict[str, list[Evaluation]] = {}
    for report, data in evaluations:
        stage = report.manifest.stage if report.manifest else ""
        groups.setdefault(str(data.get("task") or stage), []).append((report, data))
    return groups


def add_scores(page: ReportBuilder, evaluations: Sequence[Evaluation]) -> None:
    """Add scores: a chart for each task whose scores have intervals, and one table."""
    groups = group_by_task(evaluations)
    for task, group in groups.items():
        points = [(a.name, *(a.metrics[k] for k in ("score", "low", "high"))) for a, _ in group if "low" in a.metrics]
        if points:
            metric = str(group[0][1].get("metric", "score"))
            heading = "Scores" if len(groups) == 1 else f"Scores: {task}"
            page.add_intervals(heading, points, x=f"{task}: {metric}, 95% bootstrap interval")
    rows = [
        (
            a.name,
            task,
            data.get("model", ""),
            data.get("shots", ""),
            *_format_score(a.metrics, percent=data.get("percent", False)),
            _format_further_metrics(data),
            a.metrics.get("samples", ""),
            a.metrics.get("completion_tokens_per_second", ""),
            f"{a.metrics['seconds']:.0f} s" if "seconds" in a.metrics else "",
        )
        for task, group in groups.items()
        for a, data in group
    ]
    columns = (
        "evaluation",
        "task",
        "model",
        "few-shot examples",
        "score",
        "95% interval",
        "further metrics",
        "samples",
    )
    if rows:
        page.add_table("", (*columns, "completion tokens/s", "time"), rows)


def _format_score(metrics: Mapping[str, Any], *, percent: bool) -> tuple[str, str]:
    """Return a score and its interval, as the page shows them."""
    form = ".1%" if percent else ".4g"
    between = f"{metrics['low']:{form}} to {metrics['high']:{form}}" if "low" in metrics else ""
    return f"{metrics['score']:{form}}", between


def _format_further_metrics(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {v['value']:.4g}" for n, v in data.get("intervals", {}).items() if n != data.get("metric"))


def add_forgetting(page: ReportBuilder, artifacts: Sequence[Artifact]) -> None:
    """Add what trainings changed beside their task (metrics `general_*`)."""
    trained = [a for a in artifacts if "general_kl" in a.metrics]
    rows = [
        (
            a.name,
            f"{a.metrics['general_kl']:.3f}",
            f"{a.metrics['general_top1_agreement']:.1%}",
            *(
                f"{a.metrics[name]:.0%}" if name in a.metrics else ""
                for name in ("general_same_start", "general_degenerate_before", "general_degenerate")
            ),
        )
        for a in trained
    ]
    if rows:
        page.add_table(
            "Forgetting",
            (
                "model",
                "KL divergence (nats per token)",
                "top-1 agreement",
                "answers begin as before",
                "degenerate before",
                "degenerate after",
            ),
            rows,
            "Measured by the training, on general text and the first everyday questions (`num_general_prompts`).",
        )


def add_curves(page: ReportBuilder, artifacts: Sequence[Artifact]) -> None:
    """Add the loss curves of all training runs."""
    series: dict[str, list[tuple[float, float]]] = {}
    for artifact in artifacts:
        file = artifact.path / "metrics.jsonl"
        if file.exists():
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            points = [(float(r["step"] + 1), float(r["loss"])) for r in rows if "loss" in r]
            series[artifact.name] = points
            series[f"{artifact.name}, mean of 10"] = [
                (x, sum(v for _, v in points[max(0, i - 9) : i + 1]) / min(i + 1, 10))
                for i, (x, _) in enumerate(points)
            ]
    if series:
        page.add_curves("Training loss", series, x="step", y="loss (nats per label token)")


def add_samples(page: ReportBuilder, evaluations: Sequence[Evaluation], count: int) -> None:
    """Add each task's questions with every evaluation's answer; those with changed scores come first."""
    groups = {
        task: [(a.name, {s["id"]: s for s in data["samples"]}) for a, data in group if _has_answers(data)]
        for task, group in group_by_task(evaluations).items()
    }
    for task, group in groups.items():
        if not group or not count:
            continue
        ids = [i for i in group[0][1] if all(i in samples for _, samples in group)]
        ids.sort(key=lambda i: len({samples[i]["score"] for _, samples in group}) == 1)
        items = []
        for i in ids[:count]:
            first = group[0][1][i]
            item = {"": first["question"][:140], "reference": first["reference"]}
            item |= {
                f"{'✓' if samples[i]['score'] == 1 else '✗'} {name}": samples[i].get("text", "")
                for name, samples in group
            }
            items.append(item)
        page.add_samples("Samples before and after" if len(groups) == 1 else f"Samples: {task}", items)


def _has_answers(data: Mapping[str, Any]) -> bool:
    return "samples" in data and data.get("kind") != "perplexity"


def compute_size(artifact: Artifact) -> int:
    """Sum the bytes of an artifact's files."""
    assert artifact.manifest is not None
    return sum(entry.bytes for entry in artifact.manifest.files.values())


def add_sizes(page: ReportBuilder, artifacts: Sequence[Artifact]) -> None:
    """Add size, time and memory of every model and adapter."""
    rows = []
    for a in artifacts:
        if isinstance(a, (Model, Adapter)) and a.manifest is not None:
            speed = a.metrics.get("tokens_per_second")
            rows.append(
                (
                    a.name,
                    a.kind,
                    str(a.about.get("type") or a.about.get("dtype") or a.about.get("format") or ""),
                    f"{compute_size(a) / 1e6:.1f} MB",
                    f"{a.metrics.get('wall_seconds', 0):.0f} s",
                    f"{a.metrics.get('peak_memory_bytes', 0) / 1e9:.1f} GB",
                    f"{speed:.0f} tokens/s" if speed else "",
                )
            )
    if rows:
        page.add_table(
            "Sizes and cost", ("name", "kind", "format", "size", "wall time", "peak memory", "training speed"), rows
        )


def add_machine(page: ReportBuilder, artifacts: Sequence[Artifact]) -> None:
    """Add the hardware and software versions of the last run."""
    manifests = [a.manifest for a in artifacts if a.manifest is not None and a.manifest.stage]
    if manifests:
        last = manifests[-1]
        page.add_text(
            "Made with",
            f"{last.platform.get('processor', '')}, {last.threads} threads, {last.platform.get('system', '')}; "
            + ", ".join(f"{k} {v}" for k, v in last.versions.items())
            + ".",
        )
