"""Degenerate completions: empty, repeating, or calling a function that nobody offered (Holtzman et al. 2020).

Repetition is seq-rep-4, the share of repeated 4-grams (Welleck et al. 2020, "Neural text generation with unlikelihood
training"), of the whole text and of its second half, where a loop that began late is; numbers of list items do not
make them different.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import regex

from llmworks.core.text.words import WORD, fold, split_words
from llmworks.core.types import Message, Score
from llmworks.tokenize.chat.templates import parse_tool_calls

MAX_REPETITION = 0.5  # share of repeated 4-grams above which a text is degenerate
MIN_NGRAMS = 12  # shorter texts may repeat themselves, such as a list of three similar lines
SAME_START_WORDS = 3
LIST_NUMBER = regex.compile(r"^\s*\d+[.)]", regex.MULTILINE)
SAME_CHARACTER = regex.compile(r"([\p{L}\p{N}])\1{19}")
VISIBLE = regex.compile(rf"{WORD.pattern}|[^\s\w]", regex.V1)


def split_tokens(text: str) -> list[str]:
    """Return the folded words and other visible characters of a text."""
    return VISIBLE.findall(fold(text))


def compute_repetition(text: str) -> float:
    """Return seq-rep-4 of a text or of its second half, from 0 (no 4-gram twice) to nearly 1; 0 for short texts."""
    words = split_tokens(LIST_NUMBER.sub("", text))
    repeated = 0.0
    for part in (words, words[len(words) // 2 :]):
        ngrams = [tuple(part[i : i + 4]) for i in range(len(part) - 3)]
        if len(ngrams) >= MIN_NGRAMS:
            repeated = max(repeated, 1 - len(set(ngrams)) / len(ngrams))
    return repeated


def find_degeneration(text: str, *, tools: bool = False) -> str:
    """Return why a completion is degenerate, or "". `tools`: whether functions were offered."""
    if not text.strip():
        return "the completion is empty"
    if not tools and (calls := parse_tool_calls(text)[1]):
        return f"it calls {calls[0].name!r}, but no function was offered"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "it contains broken UTF-8"
    if run := SAME_CHARACTER.search(text):
        return f"it repeats the character {run[1]!r}"
    if (repetition := compute_repetition(text)) > MAX_REPETITION:
        return f"it repeats itself: {repetition:.0%} of its 4-grams are repeated"
    return ""


def not_degenerate(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Score 1 for a completion that is not degenerate, else 0. `row["tools"]`: the functions offered, if any."""
    problem = find_degeneration(completion, tools=bool(row.get("tools")))
    return Score(0.0, problem) if problem else Score(1.0)


def has_same_start(answer: str, reference: str) -> bool:
    """Return whether the first three words of an answer are those of the reference, without case and punctuation."""
    one, other = (split_words(text)[:SAME_START_WORDS] for text in (answer, reference))
    return one == other
