"""Detectors of PII and secrets: pure functions from text to findings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SensitiveSpan:
    """A match in a text: its kind, start and end (character offsets), and value."""

    kind: str
    start: int
    end: int
    value: str


def remove_overlaps(findings: list[SensitiveSpan]) -> list[SensitiveSpan]:
    """Remove overlapping findings, keeping the one given first, and sort by position."""
    chosen: list[SensitiveSpan] = []
    for finding in findings:
        if all(finding.end <= other.start or finding.start >= other.end for other in chosen):
            chosen.append(finding)
    return sorted(chosen, key=lambda f: f.start)
