"""Checks of a text: pure functions from text to findings. They know no document, no model and no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something in a text: its kind, where it begins and ends (characters), and what it says."""

    kind: str
    start: int
    end: int
    value: str


def apart(findings: list[Finding]) -> list[Finding]:
    """Findings in their order without overlaps: of two that share characters the one that was given first stays."""
    chosen: list[Finding] = []
    for finding in findings:
        if all(finding.end <= other.start or finding.start >= other.end for other in chosen):
            chosen.append(finding)
    return sorted(chosen, key=lambda f: f.start)
