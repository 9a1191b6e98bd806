"""Score a completion against its key: a number, a word, the letter of an option, or any of several.

Numbers are compared numerically.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.score.extract import extract_final_answer

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
OPTION = re.compile(r"^\W*([A-Za-z])(?:[).:,]|\W*$)")
UNITS = " \t$€£%°"


def key(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the final answer equals the row's `answer` (or `answer.key`), or one of them where it is a list.

    Errors: DataError for a row without one.
    """
    accepted = get_accepted_keys(row)
    answer = extract_final_answer(completion)
    if any(is_same(answer, wanted) for wanted in accepted):
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


def is_same(answer: str, expected: str) -> bool:
    """Return whether an answer equals the key."""
    if len(expected.strip("()")) == 1 and expected.strip("()").isalpha():
        option = OPTION.match(answer)
        return option is not None and option[1].lower() == expected.strip("()").lower()
    number = _parse_number(expected)
    if number is not None:
        found = [n for n in (_parse_number(part) for part in _find_numbers(answer)) if n is not None]
        return bool(found) and found[-1] == number
    return _normalize(answer) == _normalize(expected)


def _find_numbers(text: str) -> list[str]:
    return [m[0] for m in NUMBER.finditer(text) if any(c.isdigit() for c in m[0])]


def _parse_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip(UNITS + ".").replace(",", "")) if any(c.isdigit() for c in text) else None
    except InvalidOperation:
        return None


def _normalize(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())
