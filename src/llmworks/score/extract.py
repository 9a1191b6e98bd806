"""Extract from a completion what is scored: the final answer, a code block, a JSON value. Pure functions."""

from __future__ import annotations

import json
import re
from typing import Any

FINAL = re.compile(
    r"####|(?:final\s+)?answer\s*(?:is)?\s*[:=：]|(?:the\s+)?(?:final\s+|correct\s+)?answer\s+is"
    r"|答案\s*(?:是|为|為)?\s*[:：]?|答え\s*[は:：]|उत्तर\s*[:：]|réponse\s*:|antwort\s*:|respuesta\s*:|ответ\s*:",
    re.IGNORECASE,
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_final_answer(text: str) -> str:
    r"""Return what follows the last `Answer:`, `the answer is` or `####`, or is in the last `\boxed{}`.

    Without any of these, the last non-empty line. Markdown and LaTeX around it are removed.
    """
    return find_final_answer(text)[0]


def find_final_answer(text: str) -> tuple[str, bool]:
    """Return (the final answer, whether it is announced or boxed) of a completion."""
    place, found = -1, ""
    for match in FINAL.finditer(text):
        rest = text[match.end() :].lstrip(" \t:：*_")
        line = next((line for line in rest.splitlines() if line.strip(" \t*_")), "")
        if line.strip():
            place, found = match.start(), line
    boxes = [(match.start(), _read_box(text, match.end())) for match in BOX.finditer(text)]
    if boxes and (boxes[-1][0] > place or BOX.search(found)):
        place, found = boxes[-1]
    if place >= 0:
        return _strip_markup(found), True
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (_strip_markup(lines[-1]) if lines else ""), False


def _read_box(text: str, begin: int) -> str:
    """Return the text of a box up to its closing brace; braces may be nested to any depth."""
    depth = 1
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end]
    return text[begin:].split("\n", 1)[0]


def _strip_markup(text: str) -> str:
    """Remove emphasis, code marks, dollar signs around mathematics, and LaTeX commands of plain text."""
    text = TEXT.sub(lambda match: match[1], text.strip())
    while (stripped := text.strip().strip("`").strip()) and (
        inner := re.fullmatch(r"(\*\*|__|\*|\$\$?|\\\(|\\\[)(.+?)(?:\1|\\\)|\\\])([.!]?)", stripped)
    ):
        text = inner[2] + inner[3]
    return text.strip().strip("`").strip()


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
