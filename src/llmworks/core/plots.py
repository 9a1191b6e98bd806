"""Draw curves, bars, intervals, points and radar charts as SVG or PNG."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCENTS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569", "#0891b2", "#65a30d")


LABEL_SIZE = 7  # font size of scatter labels, in points


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "llmworks",
            "svg.fonttype": "none",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _to_svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw_curves(series: Series, x: str, y: str) -> str:
    """Draw lines as SVG."""
    figure, axes = _new_figure(8.6, 3.2)
    _draw_lines(axes, series, x, y)
    return _to_svg(figure)


def write_curves(plots: Sequence[tuple[str, Series, str, str]], path: Path) -> None:
    """Write plots (heading, series, x, y), two per row, as one PNG for slides and messages."""
    figure, first = _new_figure(11, 3 * -(-len(plots) // 2))
    first.remove()
    for number, (heading, series, x, y) in enumerate(plots):
        axes = figure.add_subplot(-(-len(plots) // 2), 2, number + 1)
        axes.set_title(heading, loc="left", fontsize=11)
        _draw_lines(axes, series, x, y)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _draw_lines(axes: Any, series: Series, x: str, y: str) -> None:
    for color, (name, points) in zip(ACCENTS * 3, series.items(), strict=False):
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            label=name,
            color=color,
            linewidth=1.5,
            marker="o" if len(points) < 12 else None,
            markersize=4,
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if len(series) > 3:
        axes.legend(
            frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )  # beside the plot, which has no free space
    elif len(series) > 1:
        axes.legend(frameon=False)


def draw_histograms(items: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw histograms as SVG, four per row; without matplotlib, which takes seconds for dozens of small plots."""
    width, height, across, left, top = 230, 122, min(4, len(items)), 10, 24
    inner, tall = width - 2 * left, height - top - 22
    parts = []
    for number, (label, item) in enumerate(items.items()):
        x, y = number % across * width + left, number // across * height + top
        counts, most = item["counts"], max([1, *item["counts"]])
        step = inner / len(counts)
        bars = "".join(
            f"M{x + i * step:.1f} {y + tall}v{-tall * n / most:.1f}h{step * 0.9:.1f}V{y + tall}z"
            for i, n in enumerate(counts)
            if n
        )
        parts.append(
            f'<text x="{x}" y="{y - 8}" font-size="11" fill="#1b1f24">{html.escape(label)}</text><path d="{bars}"'
            f' fill="{ACCENTS[0]}" opacity=".75"/>'
        )
        parts.append(f'<path d="M{x} {y + tall}h{inner}" stroke="#5b6572"/>')
        for value, anchor, place in ((0, "start", x), (item["top"], "end", x + inner)):
            parts.append(
                f'<text x="{place}" y="{y + tall + 12}" font-size="9" fill="#5b6572"'
                f' text-anchor="{anchor}">{value:g}</text>'
            )
        for bound in (item.get("low"), item.get("high")):
            if bound is not None and bound <= item["top"]:
                at = x + inner * bound / item["top"]
                parts.append(f'<path d="M{at:.1f} {y - 2}V{y + tall}" stroke="#dc2626" stroke-width="1.3"/>')
                parts.append(
                    f'<text x="{at:.1f}" y="{y + tall + 12}" font-size="9" fill="#dc2626"'
                    f' text-anchor="middle">{bound:g}</text>'
                )
    size = f"{across * width} {-(-len(items) // across) * height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}"'
        f' font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def draw_intervals(rows: Sequence[tuple[str, float, float, float]], x: str) -> str:
    """Draw points with error bars as SVG, the first row on top."""
    figure, axes = _new_figure(8.6, 0.9 + 0.42 * len(rows))
    for i, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [i, i], color=ACCENTS[0], linewidth=2, alpha=0.5)
        axes.plot([value], [i], "o", color=ACCENTS[0], markersize=6)
        axes.annotate(
            f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}",
            (value, i),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_xlabel(x)
    axes.grid(axis="x", alpha=0.25)
    return _to_svg(figure)


def draw_points(items: Sequence[tuple[str, float, float, int]]) -> str:
    """Draw names at their points, as SVG."""
    from matplotlib import colormaps

    figure, axes = _new_figure(9.6, 7.2)
    palette = colormaps["tab20"]
    for name, x, y, group in items:
        axes.plot([x], [y], ".", color=palette(group % 20), markersize=3)
        axes.annotate(
            name, (x, y), textcoords="offset points", xytext=(2, 1), fontsize=7, color=palette(group % 20 // 2 * 2)
        )
    axes.set_axis_off()
    return _to_svg(figure)


def draw_scatter(
    groups: Mapping[str, Sequence[tuple[str, float, float]]],
    line: Sequence[tuple[float, float]],
    x: str,
    y: str,
    log: bool,
) -> str:
    """Draw named points, as SVG."""
    figure, axes = _new_figure(9.6, 5.2)
    if line:
        axes.plot([p[0] for p in line], [p[1] for p in line], color="#94a3b8", linewidth=1.2, zorder=1)
    for color, (group, points) in zip(ACCENTS * 3, groups.items(), strict=False):
        axes.scatter([p[1] for p in points], [p[2] for p in points], s=22, color=color, label=group, zorder=2)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.draw_without_rendering()  # computes the points' positions
    scale = 72 / figure.dpi
    named = [
        (name, color, *(axes.transData.transform((at, height)) * scale))
        for color, (_, points) in zip(ACCENTS * 3, groups.items(), strict=False)
        for name, at, height in points
    ]
    for (name, color, left, low), (dx, dy) in zip(
        named, place_labels([(name, left, low) for name, _, left, low in named]), strict=True
    ):
        at, height = axes.transData.inverted().transform((left / scale, low / scale))
        axes.annotate(
            name,
            (at, height),
            textcoords="offset points",
            xytext=(dx, dy),
            fontsize=LABEL_SIZE,
            color=color,
            va="center",
        )
    return _to_svg(figure)


def place_labels(points: Sequence[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """Return label offsets for points (text, x, y in typographic points), from the point to the label's left middle.

    Each label takes the one of eight positions that overlaps least with other labels and points.
    """
    taken = [(x - 3, y - 3, x + 3, y + 3) for _, x, y in points]
    found = []
    for text, x, y in points:
        width, high = 0.56 * LABEL_SIZE * len(text), 0.5 * LABEL_SIZE
        places = [
            (5.0, 0.0),
            (5.0, 6.0),
            (5.0, -6.0),
            (-5 - width, 0.0),
            (-5 - width, 6.0),
            (-5 - width, -6.0),
            (-width / 2, 9.0),
            (-width / 2, -9.0),
        ]
        boxes = [(x + dx, y + dy - high, x + dx + width, y + dy + high) for dx, dy in places]
        best = min(
            range(len(places)),
            key=lambda at: sum(
                max(0.0, min(boxes[at][2], two[2]) - max(boxes[at][0], two[0]))
                * max(0.0, min(boxes[at][3], two[3]) - max(boxes[at][1], two[1]))
                for two in taken
            ),
        )
        taken.append(boxes[best])
        found.append(places[best])
    return found


def draw_bars(items: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Draw groups of horizontal bars as SVG, the first group on top; each name has its own color."""
    names = list(dict.fromkeys(name for group in items.values() for name in group))
    thick = 0.8 / max(1, len(names))
    figure, axes = _new_figure(8.6, 0.9 + max(0.32, 0.2 * len(names)) * len(items))
    for place, name in enumerate(names):
        found = [(i, group[name]) for i, group in enumerate(items.values()) if name in group]
        at = [i - 0.4 + thick * (place + 0.5) for i, _ in found]
        axes.barh(
            at,
            [v for _, (v, _, _) in found],
            height=thick * 0.92,
            color=ACCENTS[place % len(ACCENTS)],
            label=name,
            alpha=0.85,
        )
        axes.hlines(
            at, [low for _, (_, low, _) in found], [high for _, (_, _, high) in found], color="#334155", linewidth=1
        )
    axes.set_yticks(range(len(items)), list(items))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.grid(axis="x", alpha=0.25)
    if len(names) > 1:
        figure.legend(loc="outside upper left", ncols=min(3, len(names)), frameon=False, fontsize=9)
    return _to_svg(figure)


def draw_radar(axes: Sequence[str], items: Mapping[str, Sequence[float]]) -> str:
    """Draw a radar chart as SVG; the rim is the largest value, rounded up to a tenth."""
    import math

    figure, first = _new_figure(6.4, 6.0)
    first.remove()
    plot = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    for color, (name, values) in zip(ACCENTS * 3, items.items(), strict=False):
        plot.plot([*angles, angles[0]], [*values, values[0]], color=color, linewidth=2, label=name)
        plot.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.08)
    plot.set_xticks(angles, list(axes), fontsize=9)
    plot.set_ylim(0, max(0.1, math.ceil(10 * max((v for values in items.values() for v in values), default=1)) / 10))
    plot.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    plot.tick_params(axis="y", labelsize=8)
    figure.legend(loc="outside lower center", ncols=min(3, len(items)), frameon=False, fontsize=9)
    return _to_svg(figure)


Series = Mapping[str, Sequence[tuple[float, float]]]
