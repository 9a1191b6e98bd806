"""Extract the answer from generated text, filter by filter. Pure functions on text."""

from __future__ import annotations

from collections.abc import Sequence

import regex as expressions

from llmworks.core.errors import UserError
from llmworks.evaluate.protocol.task import FilterStep
from llmworks.score.extract import extract_code_block, extract_final_answer

SECONDS = 2.0  # timeout of one pattern on one answer


class PatternTimeout(Exception):
    """Timeout of a pattern on an answer; counts as no match."""


def extract(steps: Sequence[FilterStep], text: str) -> str:
    """Apply the filter steps in order. Raises Slow when a pattern times out."""
    for step in steps:
        text = _apply(step, text)
    return text


def _apply(step: FilterStep, text: str) -> str:
    if step.how == "strip":
        return text.strip()
    if step.how == "lower":
        return text.lower()
    if step.how == "upper":
        return text.upper()
    if step.how == "first_line":
        return text.strip().split("\n", 1)[0].strip()
    if step.how == "final_answer":
        return extract_final_answer(text)
    if step.how == "code":
        return extract_code_block(text, "python", "py", "python3")
    return find_match(step, text)


def find_match(step: FilterStep, text: str) -> str:
    """Return the picked match of a pattern, stripped: its first group that matched, or the whole match."""
    try:
        matches = expressions.findall(step.pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise PatternTimeout(f"the pattern timed out after {SECONDS:g} s") from None
    except expressions.error as error:
        raise UserError(f"extract: {step.pattern!r} is not a valid regular expression ({error})") from None
    if not -len(matches) <= step.pick < len(matches):
        return step.fallback
    picked = matches[step.pick]
    if isinstance(picked, tuple):
        picked = next((group for group in picked if group), step.fallback)
    return str(picked).strip()
