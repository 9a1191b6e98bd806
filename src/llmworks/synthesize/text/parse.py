"""Read what models write: lists of numbered items, labelled lines, signs that an answer is none. Pure functions."""

from __future__ import annotations

import re

ITEM = re.compile(
    r"^\s*(?:[#*-]*\s*)(?:task|question|aspect|part|step)?\s*\d+\s*[.):]\s*", re.IGNORECASE | re.MULTILINE
)
BULLET = re.compile(r"^\s*[-*•]\s+", re.MULTILINE)
QUOTES = "\"'“”‘’`"
REFUSALS = re.compile(
    r"\b(?:i(?:'|’)?m sorry|i am sorry|i apologi[sz]e|as an ai\b|i (?:cannot|can't|can’t|am unable to|am not able to))",
    re.IGNORECASE,
)


def numbered(text: str) -> list[str]:
    """The items of a numbered list, or of a list with bullets, without marks of emphasis and quotes around them; what
    stands before the list is left out.
    """
    mark = ITEM if ITEM.search(text) else BULLET
    if not mark.search(text):
        return []
    items = [bare(part) for part in mark.split(text)[1:]]
    return [item for item in items if item]


def bare(text: str) -> str:
    """A text without white space, emphasis and quotes around it."""
    text = text.strip().strip("*").strip()
    while len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text


def labelled(text: str, label: str) -> str:
    """What stands behind `Label:`, up to the next label at the beginning of a line; empty when the label is not
    there.
    """
    found = re.search(
        rf"^\W*{label}\W*:\**\s*(.*?)(?=^\W*[A-Z][A-Za-z ]{{1,24}}\**:|\Z)",
        text,
        re.MULTILINE | re.DOTALL | re.IGNORECASE,
    )
    return bare(found[1]) if found else ""


def refuses(text: str, words: int = 80) -> bool:
    """Whether a short answer only says that it cannot answer."""
    return len(text.split()) < words and REFUSALS.search(text[:200]) is not None
