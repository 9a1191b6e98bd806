"""Findings of the dataset checks, each with the rows it applies to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.template_faults import Finding

if TYPE_CHECKING:
    pass


LEVELS = ("error", "warning", "note")


@dataclass
class Case:
    """A finding and the ids of the rows it applies to."""

    finding: Finding
    rows: list[str] = field(default_factory=list)


def _add(cases: dict[str, Case], row: Row, finding: Finding) -> None:
    case = cases.setdefault(finding.code, Case(finding))
    if not case.rows or case.rows[-1] != row["id"]:
        case.rows.append(row["id"])
