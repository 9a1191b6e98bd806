"""The page of the doctor: findings, and what is learned of some rows, for a page and for a terminal."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.data.faults.case import Case
from llmworks.tokenize import view
from llmworks.tokenize.chat.templates import Rendered

FIRST, SHOWN = 2, 5  # rows drawn from the beginning; rows named for each finding, and drawn because of one

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
    """The findings as page, terminal text and metrics."""
    errors, warnings = (sum(case.finding.level == level for case in found) for level in ("error", "warning"))
    report = ctx.report
    report.title = f"{data.name} for {model.name}"
    report.lead = (
        f"{_count(errors, 'error')}, {_count(warnings, 'warning')} in {_count(counts['rows'], 'row')};"
        f" {counts['learned']:,} of {counts['tokens']:,} tokens are learned."
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
            "What is learned",
            page,
            text=(
                "The first rows, and some with findings. Green is learned, grey is only read; control tokens are red."
                " The ids are tooltips."
            ),
            plain=plain,
        )
    _write_terminal(report, found, drawn, tokenizer)
    about = {"failed": f"{_count(errors, 'error')}: this data would damage the model"} if errors else {}
    return Report(ctx.out, metrics={"errors": errors, "warnings": warnings, **counts}, about=about)


def _describe_findings(found: list[Case], report: ReportBuilder) -> None:
    """The table of findings, or that there are none."""
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
        report.table("Findings", ("level", "code", "what is wrong", "rows", "for example", "what to do"), rows)
    else:
        report.text(
            "Findings",
            "None: the template renders what the rows hold, every answer ends with a learned token that generation"
            " stops at.",
        )


def _write_terminal(
    report: ReportBuilder, found: list[Case], drawn: list[tuple[str, Rendered]], tokenizer: Any
) -> None:
    """The findings as coloured text for a terminal."""
    colours = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
    lines = [report.lead]
    lines += [
        f"{colours[c.finding.level]}{c.finding.level:<7}\x1b[0m {c.finding.code}: {c.finding.what}"
        + (f" [{_count(len(c.rows), 'row')}: {', '.join(c.rows[:3])}]" if c.rows else "")
        + (f"\n        → {c.finding.fix}" if c.finding.fix else "")
        for c in found
    ]
    lines += [f"\n{id}, learned on green:\n{view.as_ansi(tokenizer, r.ids, r.mask)}" for id, r in drawn[:FIRST]]
    report.terminal = "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
