"""FineWeb quality filter (Penedo et al. 2024, arXiv:2406.17557, section 3.5): lists, short and duplicate lines.

Decisions match datatrove's FineWebQualityFilter.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.filters.gopher import count_duplicates
from llmworks.data.filters.rules import FilterDecisions, ThresholdRule, apply_rules, safe_ratio
from llmworks.data.filters.words import TERMINAL, Array

TERMINALS = tuple(sorted(TERMINAL))


class FineWeb(Config):
    """FineWeb quality filter."""

    line_punct_thr: float = Field(0.12, ge=0, description="minimum fraction of lines that end in terminal punctuation")
    short_line_thr: float = Field(0.67, ge=0, description="maximum fraction of short lines")
    short_line_length: int = Field(30, ge=0, description="maximum characters of a short line")
    char_duplicates_ratio: float = Field(0.01, ge=0, description="maximum fraction of characters in duplicate lines")
    new_line_ratio: float = Field(0.3, ge=0, description="maximum ratio of newlines to words")


def filter_fineweb(config: FineWeb, texts: list[str], counts: Array) -> FilterDecisions:
    """Apply the filter to texts; `counts` are their word counts."""
    rows = [_line_fractions(text, config.short_line_length) for text in texts]
    punctuated, short, repeated, breaks = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    decisions = apply_rules(
        len(texts),
        [
            ThresholdRule(
                "fineweb: lines without punctuation",
                "lines that end in punctuation",
                punctuated,
                1,
                low=config.line_punct_thr,
            ),
            ThresholdRule("fineweb: short lines", "short lines", short, 1, high=config.short_line_thr),
            ThresholdRule(
                "fineweb: repeated lines",
                "characters in lines that occurred before",
                repeated,
                0.1,
                high=config.char_duplicates_ratio,
            ),
            ThresholdRule(
                "fineweb: a list", "line breaks per word", safe_ratio(breaks, counts), 0.6, high=config.new_line_ratio
            ),
        ],
    )
    decisions.reasons = [
        "fineweb: empty" if not text.strip() else reason for text, reason in zip(texts, decisions.reasons, strict=True)
    ]
    return decisions


def _line_fractions(text: str, short_line: int) -> tuple[float, float, float, int]:
    """Compute fractions of punctuated lines, short lines and duplicate-line characters, and the newline count."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines:
        return 0.0, 0.0, 0.0, 0
    breaks = text.count("\n")
    ends = sum(line[-1] in TERMINAL for line in lines)
    return (
        ends / len(lines),
        sum(len(line) <= short_line for line in lines) / len(lines),
        count_duplicates(lines)[1] / (len(text) - breaks),
        breaks,
    )
