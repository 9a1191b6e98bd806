"""Stage `evaluate.leaderboard`: combine evaluations into a leaderboard that compares only identical setups.

Two evaluations share a column when task, definition, prompts and rows are the same. Does not load a model or an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Report
from llmworks.core.context import Context
from llmworks.core.report import format_count
from llmworks.evaluate.statistics.bootstrap import holm, paired_difference, sign_flip
from llmworks.evaluate.statistics.entries import LeaderboardEntry, keep_latest, read_entry

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

CARD = "model-card.md"


class LeaderboardConfig(Config):
    """Title and focus of the leaderboard."""

    title: str = Field("Leaderboard", description="title of the page")
    model: str = Field(
        "",
        description=(
            "digest of the model that the page is about: its model-card section is written, and it is compared with"
            " the others"
        ),
    )


def leaderboard(
    config: LeaderboardConfig, reports: list[Report], ctx: Context, contaminations: list[Report] | None = None
) -> Report:
    """Build the table of models and tasks, plots and significance tests; `model-card.md` holds one model's section.

    `contaminations`: evaluate.contamination reports of some of the evaluations.

    Errors: DataError for a report that is not an evaluation.
    """
    entries = keep_latest([read_entry(report) for report in reports])
    columns = list(dict.fromkeys(e.column for e in entries))
    names = name_models(entries)
    cells = {(names[e.model], e.column): e for e in entries}
    order, shared = rank_models(cells, list(names.values()), columns)
    page = ctx.report
    page.title = config.title
    best = order[0][0]
    placed = [name for name, rank in order if rank is not None]
    page.subtitle = f"{format_count(len(order), 'model')} on {format_count(len(columns), 'task')}." + (
        f" Best on average: {best}, over {len(shared)} tasks shared by {len(placed)}"
        f" models.{describe_lead(cells, placed, shared)}"
        if len(placed) > 1
        else ""
    )
    page.add_table(
        "Leaderboard",
        ("model", "mean rank", "mean score", *columns),
        [format_model_row(name, rank, cells, columns, shared) for name, rank in order],
        "Scores with their 95% intervals; ↓: lower is better. Mean rank and mean score (of percentage metrics) are over"
        f" {', '.join(shared) or 'no task'}: the tasks shared by all models evaluated on at least half of the tasks.",
    )
    _draw_scores(columns, page, shared, placed, best, entries, order, cells)
    about = names.get(config.model, best)
    _describe_differences(cells, about, order, columns, page)
    _describe_contamination(contaminations, page)
    page.add_table(
        "Evaluation setup",
        ("task", "metric", "shots", "prompt", "samples", "models"),
        [format_setup_row(c, entries) for c in columns],
    )
    page.data = {
        "models": {
            name: {"digest": digest, "scores": {c: cells[name, c].score[0] for c in columns if (name, c) in cells}}
            for digest, name in names.items()
        },
        "ranks": dict(order),
        "columns": columns,
    }
    (ctx.out / CARD).write_text(write_card(about, cells, columns), encoding="utf-8")
    metrics = {"models": len(order), "tasks": len(columns), "best": best}
    return Report(ctx.out, metrics=metrics, about={"model": config.model})


def _draw_scores(
    columns: list[str],
    page: ReportBuilder,
    shared: list[str],
    ranked_models: list[str],
    best: str,
    entries: list[LeaderboardEntry],
    order: list[tuple[str, float | None]],
    cells: dict[tuple[str, str], LeaderboardEntry],
) -> None:
    """Add bar charts of percentage scores, and a radar chart where at least three tasks are shared."""
    percent = [c for c in columns if all(e.data["percent"] for e in entries if e.column == c)]
    if percent:
        page.add_bars(
            "Scores",
            {c: {name: cells[name, c].score for name, _ in order if (name, c) in cells} for c in percent},
            "Lines are 95% intervals.",
        )
    spokes = [c for c in shared if c in percent]
    if len(spokes) >= 3:
        page.add_radar(
            "Profile",
            spokes,
            {name: [cells[name, c].score[0] for c in spokes] for name in (ranked_models or [best])[:6]},
        )


def _describe_differences(
    cells: dict[tuple[str, str], LeaderboardEntry],
    about: str,
    order: list[tuple[str, float | None]],
    columns: list[str],
    page: ReportBuilder,
) -> None:
    """Add the table of paired tests of one model against the others."""
    tests = test_differences(cells, about, [name for name, _ in order if name != about], columns)
    if tests:
        rows = [
            (
                other,
                column,
                f"{d:+.1%}",
                f"{low:+.1%} to {high:+.1%}",
                format_p_value(p),
                format_p_value(adjusted),
                get_verdict(d, adjusted),
            )
            for other, column, d, low, high, p, adjusted in tests
        ]
        page.add_table(
            f"{about} against the others",
            ("against", "task", "difference", "95% interval", "p", "adjusted p", "verdict"),
            rows,
            f"Paired over the same samples. {len(tests)} tests are run: by chance alone {0.05 * len(tests):.1f} of them"
            " would fall below 5%, so the verdict uses the adjusted p (Holm correction).",
        )


def _describe_contamination(contaminations: list[Report] | None, page: ReportBuilder) -> None:
    """Add the table of contaminated samples."""
    rows = [
        format_contamination_row(c)
        for c in sorted(contaminations or [], key=lambda c: (str(c.about.get("task")), c.digest))
    ]
    if rows:
        page.add_table(
            "Contamination: samples that models may have seen in training",
            ("model", "task", "samples", "contaminated", "too short", "clean score", "contaminated score"),
            rows,
            "Contaminated: a 13-gram of the sample occurs in what the model or its ancestors were trained on in this"
            " workspace. The training data of external models is unknown.",
        )


def name_models(entries: Sequence[LeaderboardEntry]) -> dict[str, str]:
    """Map each model digest to a name; models with the same name get their digest appended."""
    names = {e.model: e.name for e in sorted(entries, key=lambda e: e.finished)}
    return {
        digest: name if list(names.values()).count(name) == 1 else f"{name} {digest[:6]}"
        for digest, name in names.items()
    }


def rank_models(
    cells: Mapping[tuple[str, str], LeaderboardEntry], names: Sequence[str], columns: Sequence[str]
) -> tuple[list[tuple[str, float | None]], list[str]]:
    """Rank the models: ((name, mean rank), best first and unranked last; the tasks that ranks are over).

    Tasks: those shared by all models evaluated on at least half of the tasks. A model missing one of them has no rank.
    Tied scores share the average rank.
    """
    well_covered = [name for name in names if 2 * sum((name, c) in cells for c in columns) >= len(columns)] or list(
        names
    )
    shared = deduplicate_columns(cells, [c for c in columns if all((name, c) in cells for name in well_covered)])
    ranked_models = [name for name in names if shared and all((name, c) in cells for c in shared)]
    ranks: dict[str, list[float]] = {name: [] for name in ranked_models}
    for column in shared:
        sign = -1 if cells[ranked_models[0], column].data["better"] == "higher" else 1
        values = {name: sign * cells[name, column].score[0] for name in ranked_models}
        for name in ranked_models:
            below, equal = (
                sum(v < values[name] for v in values.values()),
                sum(v == values[name] for v in values.values()),
            )
            ranks[name].append(below + (equal + 1) / 2)
    means = {name: sum(r) / len(r) for name, r in ranks.items()}
    return [
        *sorted(means.items(), key=lambda item: (item[1], item[0])),
        *((name, None) for name in sorted(names) if name not in means),
    ], shared


def deduplicate_columns(cells: Mapping[tuple[str, str], Any], columns: Sequence[str]) -> list[str]:
    """Keep, of several columns of one task, the one with the most rows, so that a task counts once."""
    best: dict[str, tuple[int, str]] = {}
    for column in columns:
        data = next(e.data for (_, c), e in cells.items() if c == column)
        task, rows = str(data.get("task", column)), len(data.get("samples", ()))
        if task not in best or rows > best[task][0]:
            best[task] = (rows, column)
    return [c for c in columns if c in {column for _, column in best.values()}]


def format_model_row(
    name: str,
    rank: float | None,
    cells: Mapping[tuple[str, str], LeaderboardEntry],
    columns: Sequence[str],
    shared: Sequence[str],
) -> tuple[Any, ...]:
    """Return a model's row."""
    percent = [cells[name, c].score[0] for c in shared if cells[name, c].data["percent"]] if rank is not None else []
    return (
        name,
        "–" if rank is None else f"{rank:.2f}",
        f"{sum(percent) / len(percent):.1%}" if percent else "–",
        *(format_score(cells[name, c]) if (name, c) in cells else "–" for c in columns),
    )


def format_score(entry: LeaderboardEntry) -> str:
    """Format a score with its interval."""
    value, low, high = entry.score
    return (
        f"{value:.1%} ({low:.0%}–{high:.0%})"
        if entry.data["percent"]
        else f"{value:.4g} ({low:.3g}–{high:.3g})" + (" ↓" if entry.data["better"] == "lower" else "")
    )


Difference = tuple[str, str, float, float, float, float, float]


def test_differences(
    cells: Mapping[tuple[str, str], LeaderboardEntry], name: str, others: Sequence[str], columns: Sequence[str]
) -> list[Difference]:
    """Test `name` against each other model on every percentage task.

    Rows: (other, task, difference in favor of `name`, low, high, p, p adjusted for all tests).
    """
    found: list[tuple[str, str, float, float, float, float]] = []
    for column in columns:
        for other in others:
            if (name, column) not in cells or (other, column) not in cells or not cells[name, column].data["percent"]:
                continue
            left, right = ({s["id"]: s for s in cells[n, column].data["samples"]} for n in (other, name))
            sign = 1 if cells[name, column].data["better"] == "higher" else -1
            ids = sorted(left)
            paired = paired_difference(
                [sign * left[i]["score"] for i in ids],
                [sign * right[i]["score"] for i in ids],
                groups=[left[i]["group"] for i in ids],
            )
            d = paired.difference
            p_value = sign_flip(
                [left[i]["score"] for i in ids],
                [right[i]["score"] for i in ids],
                groups=[left[i]["group"] for i in ids],
            )
            found.append((other, column, d.value, d.low, d.high, p_value))
    return [(*f, p) for f, p in zip(found, holm([f[-1] for f in found]), strict=True)]


def describe_lead(
    cells: Mapping[tuple[str, str], LeaderboardEntry], ranked_models: Sequence[str], shared: Sequence[str]
) -> str:
    """State whether the first model is significantly better than the second."""
    tests = test_differences(cells, ranked_models[0], [ranked_models[1]], shared)
    significant = sum(adjusted < 0.05 for *_, adjusted in tests)
    return (
        f" {f'{significant} of {len(tests)} tasks' if significant else 'No task'}"
        f" {'show' if significant > 1 else 'shows'} a significant"
        f" difference from {ranked_models[1]}, which comes next."
        if tests
        else ""
    )


def format_p_value(p_value: float) -> str:
    """Format a p-value; resampling cannot resolve less than 1 / resamples."""
    return f"{p_value:.3g}" if p_value >= 1e-4 else "< 0.0001"


def get_verdict(difference: float, p_value: float) -> str:
    """Return the verdict of a test."""
    return "not significantly different" if p_value >= 0.05 else "better" if difference > 0 else "worse"


def format_contamination_row(report: Report) -> tuple[Any, ...]:
    """Return a row of the contamination table."""
    data, m = report.read(), report.metrics
    return (
        data["model"],
        data["task"],
        m["samples"],
        m["contaminated"],
        m["too_short"],
        *(f"{m[k]:.4g}" if k in m else "–" for k in ("score_clean", "score_contaminated")),
    )


def format_setup_row(column: str, entries: Sequence[LeaderboardEntry]) -> tuple[Any, ...]:
    """Return a column's row of the setup table."""
    found = [e for e in entries if e.column == column]
    data = found[0].data
    return (column, data["metric"], data["shots"], data["protocol"].get("prompt", ""), len(data["samples"]), len(found))


def format_sample_count(data: Mapping[str, Any]) -> str:
    """Format the number of evaluated rows, and of how many."""
    evaluated, every = len(data["samples"]), int(data["protocol"].get("rows", 0))
    return f"{evaluated} of {every}" if evaluated < every else str(evaluated)


def write_card(name: str, cells: Mapping[tuple[str, str], LeaderboardEntry], columns: Sequence[str]) -> str:
    """Write the model-card section of one model."""
    columns = deduplicate_columns(
        {k: e for k, e in cells.items() if k[0] == name}, [c for c in columns if (name, c) in cells]
    )
    lines = [
        f"## Evaluation of {name}",
        "",
        "| task | metric | score | 95% interval | samples | shots | prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for column in columns:
        if (name, column) in cells:
            entry = cells[name, column]
            value, low, high = entry.score
            form = "{:.1%}" if entry.data["percent"] else "{:.4g}"
            lines.append(
                f"| {column} | {entry.data['metric']} | {form.format(value)} | {form.format(low)} to"
                f" {form.format(high)} | {format_sample_count(entry.data)} | {entry.data['shots']} |"
                f" {entry.data['protocol'].get('prompt', '')} |"
            )
    return "\n".join(lines) + "\n"
