"""LLM as a judge: prompts for a grade of one answer or a comparison of two, and parsing of the verdict.

Callers show two answers in both orders, since judges prefer the first (position bias, Zheng et al. 2023, section 3.3).
Does not call a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmworks.core.types import Message

MAX_GRADE = 10
VERDICT = re.compile(r"\[\[\s*([\d.]+|[ABC]|tie)\s*\]\]", re.IGNORECASE)
LENIENT_GRADE = re.compile(
    r"(?:grade|rating|score)\W{0,12}(?:is\W{0,4}|of\W{0,4})?([\d.]+)|\b([\d.]+)\s*(?:/|out of)\s*10\b", re.IGNORECASE
)


def format_transcript(prompt: Sequence[Message]) -> str:
    """Return a conversation as text."""
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt)


def _format_reference(reference: str) -> str:
    return f"\n\n[A right answer begins]\n{reference}\n[A right answer ends]" if reference else ""


def grading_prompt(prompt: Sequence[Message], answer: str, criteria: str = "", reference: str = "") -> str:
    """Return the prompt that asks a judge for a grade from 1 to 10.

    A reference answer helps where the judge is weaker than the question (Zheng et al. 2023, section 3.4).
    """
    what = criteria or "whether it does what was asked, is right, complete and clear, and says nothing needless"
    return (
        "Grade the answer at the end of this conversation:"
        f" {what}.\n\n{format_transcript(prompt)}{_format_reference(reference)}\n\n[The answer"
        f" begins]\n{answer}\n[The answer"
        " ends]\n\nSay in one or two sentences what is good and bad about it, then write a grade from 1 (useless) to"
        " 10 (could not be better) in double brackets, like this: [[5]]"
    )


def comparison_prompt(
    prompt: Sequence[Message], first: str, second: str, criteria: str = "", reference: str = ""
) -> str:
    """Return the prompt that asks a judge for the better of two answers."""
    what = criteria or "which does better what was asked, is right, complete and clear"
    return (
        f"Compare two answers to this conversation: {what}. Their order and length do not"
        f" matter.\n\n{format_transcript(prompt)}{_format_reference(reference)}\n\n[Answer A"
        f" begins]\n{first}\n[Answer A"
        f" ends]\n\n[Answer B begins]\n{second}\n[Answer B ends]\n\nSay in one or two sentences why, then write [[A]],"
        " [[B]], or [[C]] for a tie."
    )


def parse_grade(text: str) -> float | None:
    """Parse the grade of a judge, scaled to 0 to 1; None when there is none from 1 to 10."""
    found = [m[1] for m in VERDICT.finditer(text)] or [m[1] or m[2] for m in LENIENT_GRADE.finditer(text)]
    try:
        grade = float(found[-1].rstrip(".")) if found else 0.0
    except ValueError:
        return None
    return (grade - 1) / (MAX_GRADE - 1) if 1 <= grade <= MAX_GRADE else None


def parse_choice(text: str) -> str:
    """Parse the verdict of a judge: "A", "B", or "C" for a tie; empty when there is none."""
    found = [m[1].upper() for m in VERDICT.finditer(text)]
    return {"TIE": "C"}.get(found[-1], found[-1]) if found and found[-1] in ("A", "B", "C", "TIE") else ""
