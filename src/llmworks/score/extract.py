"""Extract from a completion what is scored: the final answer, a code block, a JSON value. Pure functions."""

from __future__ import annotations

import json
import re
from typing import Any

FINAL = re.compile(
    r"(?:\\boxed\{((?:[^{}]|\{[^{}]*\})*)\})|(?:####|(?:final\s+)?answer\s*(?:is)?\s*[:=]|(?:the\s+)?(?:final\s+"
    r"|correct\s+)?answer\s+is)\s*:?["
    r" \t]*([^\n]*)",
    re.IGNORECASE,
)
FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_final_answer(text: str) -> str:
    r"""Return what follows the last `Answer:`, `the answer is` or `####`, or is in the last `\boxed{}`.

    Without any of these, the last non-empty line.
    """
    matches = list(FINAL.finditer(text))
    if matches:
        return next(part for part in matches[-1].groups() if part is not None).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def extract_code_block(text: str, *languages: str) -> str:
    """Return the last fenced block in one of these languages or without a language; else the last block.

    The whole text where there is no fence.
    """
    blocks = FENCE.findall(text)
    fitting = [body for language, body in blocks if language.lower() in ("", *languages)]
    return str(fitting[-1] if fitting else blocks[-1][1] if blocks else text)


def extract_json(text: str) -> Any:
    """Return the JSON value of a completion: all of it, its last fenced block, or the first object or array in it.

    Errors: ValueError when there is none.
    """
    candidates = [text.strip()]
    if FENCE.search(text):
        candidates.insert(0, extract_code_block(text, "json").strip())
    candidates += [text[at:] for at in (text.find("{"), text.find("[")) if at >= 0]
    for candidate in candidates:
        try:
            return (
                json.JSONDecoder().raw_decode(candidate)[0] if candidate is not candidates[0] else json.loads(candidate)
            )
        except ValueError:
            continue
    raise ValueError("no JSON in the completion")
