"""Write the report of data.doctor: findings, and the loss mask of sample rows, as HTML and terminal output."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.data.faults.case import Case
from llmworks.tokenize import view
from llmworks.tokenize.chat.templates import Rendered

FIRST, SHOWN = 2, 5  # first rows shown; rows listed for each finding, and shown because of one

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


def write_report(
    ctx: Context,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    tokenizer: Any,
    found: list[Case],
    drawn: list[tuple[str, Rendered]],
    counts: dict[str, int],
) -> Report:
    """Write the findings as an HTML page, terminal text and metrics."""
    errors, warnings = (sum(case.finding.level == level for case in found) for level in ("error", "warning"))
    report = ctx.report
    report.title = f"{data.name} for {model.name}"
    report.lead = (
        f"{_count(errors, 'error')}, {_count(warnings, 'warning')} in {_count(counts['rows'], 'row')};"
        f" {counts['learned']:,} of {counts['tokens']:,} tokens are trained on."
    )
    report.data = {
        "errors": errors,
        "warnings": warnings,
        **counts,
        "findings": [
            {
                "code": c.finding.code,
                "level": c.finding.level,
                "what": c.finding.what,
                "fix": c.finding.fix,
                "rows": len(c.rows),
                "examples": c.rows[:SHOWN],
            }
            for c in found
        ],
    }
    _describe_findings(found, report)
    page = view.STYLE + "".join(
        f"<p class=note>{html.escape(id)}</p>{view.as_html(tokenizer, r.ids, r.mask)}" for id, r in drawn
    )
    plain = "\n\n".join(f"{id}\n{view.as_plain(tokenizer, r.ids, r.mask)}" for id, r in drawn)
    if drawn:
        report.drawing(
            "Loss mask",
            page,
            text=(
                "The first rows, and some with findings. Green tokens are trained on, gray ones are masked; control"
                " tokens are red. Token ids are tooltips."
            ),
            plain=plain,
        )
    _write_terminal(report, found, drawn, tokenizer)
    about = {"failed": f"{_count(errors, 'error')}: training on this data would damage the model"} if errors else {}
    return Report(ctx.out, metrics={"errors": errors, "warnings": warnings, **counts}, about=about)


def _describe_findings(found: list[Case], report: ReportBuilder) -> None:
    """Add the table of findings, or state that there are none."""
    if found:
        rows = [
            (
                c.finding.level,
                c.finding.code,
                c.finding.what,
                len(c.rows) or "template",
                ", ".join(c.rows[:SHOWN]),
                c.finding.fix,
            )
            for c in found
        ]
        report.table("Findings", ("level", "code", "problem", "rows", "examples", "fix"), rows)
    else:
        report.text(
            "Findings",
            "None: the chat template renders the rows faithfully, and every answer ends with a trained stop token.",
        )


def _write_terminal(
    report: ReportBuilder, found: list[Case], drawn: list[tuple[str, Rendered]], tokenizer: Any
) -> None:
    """Write the findings as colored terminal text."""
    colours = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
    lines = [report.lead]
    lines += [
        f"{colours[c.finding.level]}{c.finding.level:<7}\x1b[0m {c.finding.code}: {c.finding.what}"
        + (f" [{_count(len(c.rows), 'row')}: {', '.join(c.rows[:3])}]" if c.rows else "")
        + (f"\n        → {c.finding.fix}" if c.finding.fix else "")
        for c in found
    ]
    lines += [
        f"\n{id}, tokens trained on in green:\n{view.as_ansi(tokenizer, r.ids, r.mask)}" for id, r in drawn[:FIRST]
    ]
    report.terminal = "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
