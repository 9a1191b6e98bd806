"""Length and symbol filter for instructions and answers: too short, too long, or not natural language."""

from __future__ import annotations

import re

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.filters.rules import FilterDecisions, ThresholdRule, apply_rules

LETTERS = re.compile(r"[^\W\d_]")
DIGITS = re.compile(r"\d")
SPACE = re.compile(r"\s")
RUN = re.compile(r"(.)\1{9,}", re.DOTALL)


class Instruction(Config):
    """Filter for short texts such as instructions and answers."""

    min_characters: int = Field(10, ge=0, description="minimum number of characters")
    max_characters: int = Field(20_000, gt=0, description="maximum number of characters")
    max_symbol_ratio: float = Field(
        0.25, ge=0, description="maximum fraction of characters that are neither letters, digits nor whitespace"
    )
    max_digit_ratio: float = Field(0.3, ge=0, description="maximum fraction of characters that are digits")
    max_character_run: int = Field(100, gt=0, description="maximum run of the same character")


def filter_instructions(config: Instruction, texts: list[str]) -> FilterDecisions:
    """Apply the filter to texts."""
    size = np.array([len(text) for text in texts], dtype=float)
    inked = np.maximum(1, size - [len(SPACE.findall(text)) for text in texts])
    digits = np.array([len(DIGITS.findall(text)) for text in texts])
    letters = np.array([len(LETTERS.findall(text)) for text in texts])
    runs = np.array([max((len(match.group()) for match in RUN.finditer(text)), default=0) for text in texts])
    return apply_rules(
        len(texts),
        [
            ThresholdRule("instruction: too short", "characters", size, 4000, low=config.min_characters),
            ThresholdRule("instruction: too long", "characters", size, 4000, high=config.max_characters),
            ThresholdRule(
                "instruction: symbols",
                "share of symbols",
                (inked - digits - letters) / inked,
                1,
                high=config.max_symbol_ratio,
            ),
            ThresholdRule("instruction: digits", "share of digits", digits / inked, 1, high=config.max_digit_ratio),
            ThresholdRule(
                "instruction: one character repeated",
                "longest run of one character",
                runs,
                200,
                high=config.max_character_run,
            ),
        ],
    )
