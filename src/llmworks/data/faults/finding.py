"""Findings of the dataset checks, each with the rows it applies to."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.template_faults import TrainingFault

LEVELS = ("error", "warning", "note")


@dataclass
class DatasetFinding:
    """A finding and the ids of the rows it applies to."""

    finding: TrainingFault
    rows: list[str] = field(default_factory=list)


def add_finding(findings: dict[str, DatasetFinding], row: Row, finding: TrainingFault) -> None:
    """Add a row to the finding of its code."""
    case = findings.setdefault(finding.code, DatasetFinding(finding))
    if not case.rows or case.rows[-1] != row["id"]:
        case.rows.append(row["id"])
