"""Parse model output: numbered lists, labeled lines, refusals. Pure functions."""

from __future__ import annotations

import re

from llmworks.core.text.words import count_words

ITEM = re.compile(
    r"^\s*(?:[#*-]*\s*)(?:task|question|aspect|part|step)?\s*\d+\s*[.):]\s*", re.IGNORECASE | re.MULTILINE
)
BULLET = re.compile(r"^\s*[-*•]\s+", re.MULTILINE)
QUOTES = "\"'“”‘’`"
REFUSALS = re.compile(
    r"\b(?:i(?:'|’)?m sorry|i am sorry|i apologi[sz]e|as an ai\b|i (?:cannot|can't|can’t|am unable to|am not able to))",
    re.IGNORECASE,
)


def parse_list(text: str) -> list[str]:
    """Return the items of a numbered or bulleted list, without emphasis and quotes; text before the list is ignored."""
    mark = ITEM if ITEM.search(text) else BULLET
    if not mark.search(text):
        return []
    items = [strip_markup(part) for part in mark.split(text)[1:]]
    return [item for item in items if item]


def strip_markup(text: str) -> str:
    """Strip white space, emphasis and quotes."""
    text = text.strip().strip("*").strip()
    while len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text


def parse_labeled(text: str, label: str) -> str:
    """Return the text after `Label:`, up to the next label at the start of a line; empty without the label."""
    found = re.search(
        rf"^\W*{label}\W*:\**\s*(.*?)(?=^\W*[A-Z][A-Za-z ]{{1,24}}\**:|\Z)",
        text,
        re.MULTILINE | re.DOTALL | re.IGNORECASE,
    )
    return strip_markup(found[1]) if found else ""


def is_refusal(text: str, words: int = 80) -> bool:
    """Return whether a short answer is a refusal."""
    return count_words(text) < words and REFUSALS.search(text[:200]) is not None
