"""Reports: the same blocks as JSON, Markdown and one self-contained HTML page.

A `ReportBuilder` collects blocks (text, tables, curves, intervals, samples, drawings) and writes them. Plots are inline
SVG by matplotlib without dates, so that equal data gives an equal page.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llmworks.core.plots import (
    Series,
    draw_bars,
    draw_curves,
    draw_histograms,
    draw_intervals,
    draw_points,
    draw_radar,
    draw_scatter,
)

TERMINAL_FILE = "report.txt"
MISSING = "–"  # placeholder for an unknown value

_STYLE = "\n" + Path(__file__).with_name("report.css").read_text(encoding="utf-8")


MAX_TAG_BUTTONS = 24
FILTER_SCRIPT = Path(__file__).with_name("report_filter.js").read_text(encoding="utf-8").rstrip("\n")


@dataclass(frozen=True)
class ReportBlock:
    """One part of a report. `kind` determines which other fields are used.

    `draw` returns a plot's SVG and is called only when the page is written: drawing takes half of the time of a small
    training run, and a self-test writes no page.
    """

    kind: str
    heading: str = ""
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    svg: str = ""
    data: Any = None
    draw: Callable[[], str] = str


@dataclass
class ReportBuilder:
    """Collects blocks, then writes `report.json`, `report.md` and `report.html`."""

    title: str = ""
    subtitle: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    blocks: list[ReportBlock] = field(default_factory=list)
    terminal: str = ""  # colored text for the terminal

    def add_text(self, heading: str, text: str) -> None:
        """Add a heading with a paragraph."""
        self.blocks.append(ReportBlock("text", heading, text))

    def add_table(self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Add a table; numbers are right-aligned with four significant digits."""
        self.blocks.append(ReportBlock("table", heading, note, tuple(columns), tuple(tuple(r) for r in rows)))

    def add_curves(self, heading: str, series: Series, *, x: str, y: str, note: str = "") -> None:
        """Add lines over a shared axis; each series is a list of (x, y) points."""
        data = {k: list(v) for k, v in series.items()}
        self.blocks.append(ReportBlock("plot", heading, note, data=data, draw=partial(draw_curves, data, x, y)))

    def add_intervals(
        self, heading: str, rows: Sequence[tuple[str, float, float, float]], *, x: str, note: str = ""
    ) -> None:
        """Add values with confidence intervals, one per line: (name, value, low, high)."""
        draw = partial(draw_intervals, list(rows), x)
        self.blocks.append(ReportBlock("plot", heading, note, data=[list(r) for r in rows], draw=draw))

    def add_bars(
        self, heading: str, items: Mapping[str, Mapping[str, tuple[float, float, float]]], note: str = ""
    ) -> None:
        """Add grouped bars with error bars: group -> name -> (value, low, high), values between 0 and 1."""
        data = {k: {n: list(v) for n, v in g.items()} for k, g in items.items()}
        drawn = {k: dict(g) for k, g in items.items()}
        self.blocks.append(ReportBlock("plot", heading, note, data=data, draw=partial(draw_bars, drawn)))

    def add_radar(
        self, heading: str, axes: Sequence[str], items: Mapping[str, Sequence[float]], note: str = ""
    ) -> None:
        """Add a radar chart: one closed line per name, values between 0 and 1."""
        values = {k: list(v) for k, v in items.items()}
        draw = partial(draw_radar, list(axes), values)
        self.blocks.append(ReportBlock("plot", heading, note, data={"axes": list(axes), **values}, draw=draw))

    def add_histograms(self, heading: str, items: Mapping[str, Mapping[str, Any]], note: str = "") -> None:
        """Add small histograms side by side.

        Each has `counts` in equal bins from 0 to `top`, and optional bounds `low` and `high`.
        """
        data = {k: dict(v) for k, v in items.items()}
        self.blocks.append(ReportBlock("plot", heading, note, data=data, draw=partial(draw_histograms, data)))

    def add_points(self, heading: str, items: Sequence[tuple[str, float, float, int]], note: str = "") -> None:
        """Add named points in a plane: (name, x, y, group); groups differ in color."""
        draw = partial(draw_points, list(items))
        self.blocks.append(ReportBlock("plot", heading, note, data=[list(i) for i in items], draw=draw))

    def add_scatter(
        self,
        heading: str,
        groups: Mapping[str, Sequence[tuple[str, float, float]]],
        line: Sequence[tuple[float, float]] = (),
        *,
        x: str,
        y: str,
        log: bool = False,
        note: str = "",
    ) -> None:
        """Add a scatter plot: points (name, x, y) by group, and an optional line. `log`: log scale for y."""
        self.blocks.append(
            ReportBlock(
                "plot",
                heading,
                note,
                draw=partial(draw_scatter, {k: list(v) for k, v in groups.items()}, list(line), x, y, log),
                data={
                    "groups": {name: [list(point) for point in points] for name, points in groups.items()},
                    "line": [list(place) for place in line],
                },
            )
        )

    def add_samples(self, heading: str, items: Sequence[Mapping[str, str]], note: str = "") -> None:
        """Add examples: each item maps labels to text; its first entry is the summary line."""
        self.blocks.append(ReportBlock("samples", heading, note, data=[dict(i) for i in items]))

    def add_pairs(
        self,
        heading: str,
        items: Sequence[tuple[str, tuple[str, str], tuple[str, str]]],
        note: str = "",
        tags: Sequence[Sequence[str]] = (),
    ) -> None:
        """Add texts side by side with their differences marked: (summary, (label, text), (label, text)).

        The page can be filtered by their tags.
        """
        self.blocks.append(
            ReportBlock(
                "pairs",
                heading,
                note,
                rows=tuple(tuple(t) for t in tags),
                data=[(title, tuple(left), tuple(right)) for title, left, right in items],
            )
        )

    def add_drawing(self, heading: str, svg: str, text: str = "", plain: str = "") -> None:
        """Add an SVG drawing; `plain` replaces it in Markdown."""
        self.blocks.append(ReportBlock("drawing", heading, text, svg=svg, data=plain))

    def add_picture(self, heading: str, path: Path, note: str = "") -> None:
        """Embed a PNG that is stored beside the report."""
        import base64

        source = base64.b64encode(path.read_bytes()).decode()
        image = f'<img style="max-width:100%" alt="{html.escape(heading)}" src="data:image/png;base64,{source}">'
        self.blocks.append(ReportBlock("drawing", heading, note, svg=image, data=f"see {path.name}"))

    def write(self, out: Path) -> None:
        """Write the files into `out`: JSON, Markdown, HTML, and the terminal text if there is one."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(
            json.dumps({"title": self.title, **self.data}, indent=1, ensure_ascii=False, sort_keys=True) + "\n",
            encoding="utf-8",
        )
        (out / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        (out / "report.html").write_text(self.to_html(), encoding="utf-8")
        if self.terminal:
            (out / TERMINAL_FILE).write_text(self.terminal + "\n", encoding="utf-8")

    def to_markdown(self) -> str:
        """Return the report as Markdown; plots are omitted."""
        parts = [f"# {self.title}", self.subtitle]
        for block in self.blocks:
            if block.heading:
                parts.append(f"## {block.heading}")
            if block.text:
                parts.append(block.text)
            if block.kind == "table":
                lines = ["| " + " | ".join(block.columns) + " |", "|" + "---|" * len(block.columns)]
                lines += [
                    "| " + " | ".join(_format_cell(v).replace("|", "\\|").replace("\n", " ") for v in row) + " |"
                    for row in block.rows
                ]
                parts.append("\n".join(lines))
            elif block.kind == "samples":
                parts += [
                    "\n".join(
                        f"- {k}: `{' '.join(v.split())}`" if k else f"- {' '.join(v.split())}" for k, v in item.items()
                    )
                    for item in block.data
                ]
            elif block.kind == "pairs":
                parts += [
                    "\n".join([f"- {t}", *(f"  - {label}: `{' '.join(text.split())}`" for label, text in sides)])
                    for t, *sides in block.data
                ]
            elif block.kind == "drawing" and block.data:
                parts.append("```\n" + block.data + "\n```")
            elif block.kind == "plot":
                parts.append("(plot: see report.html)")
        return "\n\n".join(p for p in parts if p) + "\n"

    def to_html(self) -> str:
        """Return the report as one self-contained page."""
        body = "".join(_block_html(block) for block in self.blocks)
        lead = f"<p>{html.escape(self.subtitle)}</p>" if self.subtitle else ""
        title = html.escape(self.title)
        head = (
            '<meta charset="utf-8"><meta name="viewport"'
            f' content="width=device-width,initial-scale=1"><title>{title}</title><style>{_STYLE}</style>'
        )
        return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{lead}{body}</body></html>\n'


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, as in "1 model", "2 models"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _block_html(block: ReportBlock) -> str:
    out = f"<h2>{html.escape(block.heading)}</h2>" if block.heading else ""
    if block.kind == "text":
        return out + "".join(f"<p>{html.escape(p)}</p>" for p in block.text.split("\n\n"))
    note = f'<p class="note">{html.escape(block.text)}</p>' if block.text else ""
    if block.kind == "table":
        numeric = [
            any(_is_number(row[i]) for row in block.rows)
            and all(_is_number(row[i]) or row[i] == MISSING for row in block.rows)
            for i in range(len(block.columns))
        ]
        head = "".join(
            f"<th{' class=n' if right else ''}>{html.escape(c)}</th>"
            for c, right in zip(block.columns, numeric, strict=True)
        )
        rows = "".join("<tr>" + "".join(_cell_html(v) for v in row) + "</tr>" for row in block.rows)
        wide = " class=wide" if len(block.columns) > 8 else ""
        return f'{out}{note}<div class="scroll"><table{wide}><tr>{head}</tr>{rows}</table></div>'
    if block.kind == "samples":
        items = ""
        for number, item in enumerate(block.data):
            first, *rest = item.items()
            fields = "".join(f"<dt>{html.escape(k)}</dt><dd><pre>{html.escape(v)}</pre></dd>" for k, v in rest)
            summary = f"<summary>{html.escape(first[1])}</summary>"
            items += f"<details{' open' if number == 0 else ''}>{summary}<dl>{fields}</dl></details>"
        return out + note + items
    if block.kind == "pairs":
        tags = block.rows or [()] * len(block.data)
        pairs = "".join(
            _pair_html(number, title, left, right, tags[number])
            for number, (title, left, right) in enumerate(block.data)
        )
        return f"{out}{note}{_filter_html(block.rows)}<div>{pairs}</div>"
    return f"{out}{note}<figure>{block.svg or block.draw()}</figure>"


def _filter_html(tags: Sequence[Sequence[Any]]) -> str:
    """Return tag buttons and a search field that filter the items after them.

    With many tags, only the most frequent ones that occur more than once are shown.
    """
    counts = Counter(tag for row in tags for tag in row)
    if not counts:
        return ""
    buttons = "".join(
        f'<button type="button" data-tag="{html.escape(tag, quote=True)}">{html.escape(tag)} ({n})</button>'
        for tag, n in counts.most_common(MAX_TAG_BUTTONS)
        if n > 1 or len(counts) <= MAX_TAG_BUTTONS
    )
    return (
        '<div class="filter"><input type="search" placeholder="words" aria-label="only with these words">'
        f" {buttons}</div><script>{FILTER_SCRIPT}</script>"
    )


def _pair_html(number: int, title: str, left: tuple[str, str], right: tuple[str, str], tags: Sequence[Any] = ()) -> str:
    """Return two texts in columns; words that occur in only one of them are marked."""
    import difflib
    import re

    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for _, text in (left, right))
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, words in zip(sides, (a[a1:a2], b[b1:b2]), strict=True):
            text = html.escape("".join(words))
            side.append(f"<mark>{text}</mark>" if kind != "equal" and text.strip() else text)
    columns = "".join(
        f"<div><dt>{html.escape(label)}</dt><pre>{''.join(side)}</pre></div>"
        for (label, _), side in zip((left, right), sides, strict=True)
    )
    tagged = f' data-tags="{html.escape(chr(10).join(map(str, tags)), quote=True)}"' if tags else ""
    return (
        f"<details{tagged}{' open' if number < 2 else ''}><summary>{html.escape(title)}</summary><div"
        f' class="pair">{columns}</div></details>'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell_html(value: Any) -> str:
    return f"<td{' class=n' if _is_number(value) or value == MISSING else ''}>{html.escape(_format_cell(value))}</td>"
