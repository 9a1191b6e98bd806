"""Write the report of data.doctor: findings, and the loss mask of sample rows, as HTML and terminal output."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.data.faults.finding import DatasetFinding
from llmworks.tokenize import view
from llmworks.tokenize.chat.templates import RenderedConversation

FIRST, SHOWN = 2, 5  # first rows shown; rows listed for each finding, and shown because of one

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


def write_report(
    ctx: Context,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    tokenizer: Any,
    findings: list[DatasetFinding],
    samples: list[tuple[str, RenderedConversation]],
    counts: dict[str, int],
) -> Report:
    """Write the findings as an HTML page, terminal text and metrics."""
    errors, warnings = (sum(case.finding.level == level for case in findings) for level in ("error", "warning"))
    report = ctx.report
    report.title = f"{data.name} for {model.name}"
    report.subtitle = (
        f"{_format_count(errors, 'error')}, {_format_count(warnings, 'warning')} in"
        f" {_format_count(counts['rows'], 'row')};"
        f" {counts['num_label_tokens']:,} of {counts['tokens']:,} tokens are trained on."
    )
    report.data = {
        "errors": errors,
        "warnings": warnings,
        **counts,
        "findings": [
            {
                "code": c.finding.code,
                "level": c.finding.level,
                "what": c.finding.message,
                "fix": c.finding.fix,
                "rows": len(c.rows),
                "examples": c.rows[:SHOWN],
            }
            for c in findings
        ],
    }
    _add_findings_table(findings, report)
    page = view.STYLE + "".join(
        f"<p class=note>{html.escape(id)}</p>{view.format_html(tokenizer, r.ids, r.mask)}" for id, r in samples
    )
    plain = "\n\n".join(f"{id}\n{view.format_plain(tokenizer, r.ids, r.mask)}" for id, r in samples)
    if samples:
        report.add_drawing(
            "Loss mask",
            page,
            text=(
                "The first rows, and some with findings. Green tokens are trained on, gray ones are masked; control"
                " tokens are red. Token ids are tooltips."
            ),
            plain=plain,
        )
    _write_terminal(report, findings, samples, tokenizer)
    about = (
        {"failed": f"{_format_count(errors, 'error')}: training on this data would damage the model"} if errors else {}
    )
    return Report(ctx.out, metrics={"errors": errors, "warnings": warnings, **counts}, about=about)


def _add_findings_table(findings: list[DatasetFinding], report: ReportBuilder) -> None:
    """Add the table of findings, or state that there are none."""
    if findings:
        rows = [
            (
                c.finding.level,
                c.finding.code,
                c.finding.message,
                len(c.rows) or "template",
                ", ".join(c.rows[:SHOWN]),
                c.finding.fix,
            )
            for c in findings
        ]
        report.add_table("Findings", ("level", "code", "problem", "rows", "examples", "fix"), rows)
    else:
        report.add_text(
            "Findings",
            "None: the chat template renders the rows faithfully, and every answer ends with a trained stop token.",
        )


def _write_terminal(
    report: ReportBuilder,
    findings: list[DatasetFinding],
    samples: list[tuple[str, RenderedConversation]],
    tokenizer: Any,
) -> None:
    """Write the findings as colored terminal text."""
    colors = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
    lines = [report.subtitle]
    lines += [
        f"{colors[c.finding.level]}{c.finding.level:<7}\x1b[0m {c.finding.code}: {c.finding.message}"
        + (f" [{_format_count(len(c.rows), 'row')}: {', '.join(c.rows[:3])}]" if c.rows else "")
        + (f"\n        → {c.finding.fix}" if c.finding.fix else "")
        for c in findings
    ]
    lines += [
        f"\n{id}, tokens trained on in green:\n{view.format_ansi(tokenizer, r.ids, r.mask)}"
        for id, r in samples[:FIRST]
    ]
    report.terminal = "\n".join(lines)


def _format_count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
