"""Extract the answer from generated text, filter by filter. Pure functions on text."""

from __future__ import annotations

from collections.abc import Sequence

import regex as expressions

from llmworks.core.errors import UserError
from llmworks.evaluate.protocol.task import Step
from llmworks.score.extract import code_block, final_answer

SECONDS = 2.0  # timeout of one pattern on one answer


class Slow(Exception):
    """Timeout of a pattern on an answer; counts as no match."""


def extract(steps: Sequence[Step], said: str) -> str:
    """Apply the filter steps in order. Raises Slow when a pattern times out."""
    for step in steps:
        said = _apply(step, said)
    return said


def _apply(step: Step, said: str) -> str:
    if step.how == "strip":
        return said.strip()
    if step.how == "lower":
        return said.lower()
    if step.how == "upper":
        return said.upper()
    if step.how == "first_line":
        return said.strip().split("\n", 1)[0].strip()
    if step.how == "final_answer":
        return final_answer(said)
    if step.how == "code":
        return code_block(said, "python", "py", "python3")
    return match(step, said)


def match(step: Step, said: str) -> str:
    """Return the picked match of a pattern, stripped: its first group that matched, or the whole match."""
    try:
        found = expressions.findall(step.pattern, said, timeout=SECONDS)
    except TimeoutError:
        raise Slow(f"the pattern timed out after {SECONDS:g} s") from None
    except expressions.error as error:
        raise UserError(f"extract: {step.pattern!r} is not a valid regular expression ({error})") from None
    if not -len(found) <= step.pick < len(found):
        return step.fallback
    picked = found[step.pick]
    if isinstance(picked, tuple):
        picked = next((group for group in picked if group), step.fallback)
    return str(picked).strip()
