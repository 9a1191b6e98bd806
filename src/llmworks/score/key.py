"""Score a completion against its key: a number, a formula, a word, the letter of an option, or any of several.

Numbers are compared by value. Formulas are compared by math-verify. Text is compared without case, quotes and light
punctuation, with its marks and symbols.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from llmworks.core.errors import DataError
from llmworks.core.text.words import fold
from llmworks.core.types import Message, Score
from llmworks.score.extract import find_final_answer
from llmworks.score.math.equality import is_equal_formula, is_formula
from llmworks.score.math.numbers import find_answer_number, read_number

# The letter of an option: alone, before punctuation, or before a word that gives the reason.
OPTION = re.compile(
    r"\W*(?:(?:option|choice|letter|answer)\s+)?\(?([A-Za-z])(?![\w'’])(?=[)\].:,;]|[^\w+#<>=]*$|\s*[-–—]\s|\s+"
    r"(?:because|since|as|which|is|due|given)\b|\s*\()",
    re.IGNORECASE,
)
# What text is compared without: punctuation that is not part of a symbol such as # in C#
PUNCTUATION = regex.compile(r"(?<![\p{L}\p{N}])#|[\p{P}`--#]", regex.V1)
SYMBOL_TAIL = regex.compile(r"(?<=[\p{L}\p{N}+#])[+#]")


def key(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the final answer equals the row's `answer` (or `answer.key`), or one of them where it is a list.

    Errors: DataError for a row without one.
    """
    accepted = get_accepted_keys(row)
    answer, marked = find_final_answer(completion)
    if any(is_same(answer, wanted, marked=marked) for wanted in accepted):
        return Score(1.0)
    return Score(0.0, f"answered {answer[:80]!r}, expected {' or '.join(map(repr, accepted))[:120]}")


def get_accepted_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of a row.

    Errors: DataError for a row without one.
    """
    answer = row.get("answer")
    answer = answer.get("key") if isinstance(answer, Mapping) else answer
    found = answer if isinstance(answer, list) else [answer]
    if not found or any(
        not isinstance(a, (str, int, float)) or isinstance(a, bool) or not str(a).strip() for a in found
    ):
        raise DataError(
            f'row {row.get("id")!r}: `answer` must be the key (string or number), a list of keys, or {{"key": ...}}'
        )
    return [str(a) for a in found]


def is_same(answer: str, expected: str, *, marked: bool = True) -> bool:
    """Return whether an answer equals the key. `marked`: the answer was announced, or boxed."""
    letter = expected.strip().strip("()")
    if len(letter) == 1 and letter.isascii() and letter.isalpha():
        option = OPTION.match(answer)
        return option is not None and option[1].lower() == letter.lower()
    number = read_number(expected)
    if number is not None:
        return find_answer_number(answer, marked=marked) == number
    if is_formula(expected):
        answer = answer.strip().rstrip(".")
        return fold(answer).replace(" ", "") == fold(expected).replace(" ", "") or is_equal_formula(expected, answer)
    return _normalize(answer) == _normalize(expected)


def _normalize(text: str) -> str:
    folded = fold(text)
    words = PUNCTUATION.sub(" ", folded).split()
    return " ".join(words) or folded.replace(" ", "")
