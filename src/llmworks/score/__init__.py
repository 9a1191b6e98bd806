"""Score functions by name: (prompt, completion, row) -> Score. Shared by evaluation, reward functions and synthesis.

The expected result is in the row's `answer`: {NAME: ARGUMENTS} for a function call, a key, or an object whose first
field names the kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.errors import DataError, UserError
from llmworks.core.types import Message, Score, ScoreFunction
from llmworks.score.code import code
from llmworks.score.constraints import constraints_loose, constraints_share, constraints_strict
from llmworks.score.degeneration import not_degenerate
from llmworks.score.function_call import function_call, valid_call
from llmworks.score.key import key
from llmworks.score.shape import regex, schema
from llmworks.score.sql import sql

VERIFIERS = {
    "constraints": constraints_strict,
    "tests": code,
    "sql": sql,
    "schema": schema,
    "regex": regex,
    "key": key,
}  # field of `answer` -> its score function


def score_verified(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Score with the function that matches the row's `answer`.

    Errors: DataError for a row without one.
    """
    answer = row.get("answer")
    if isinstance(answer, Mapping):
        verifier = next(
            (function for field, function in VERIFIERS.items() if field in answer),
            function_call if row.get("tools") else None,
        )
    else:
        verifier = key if answer is not None else None
    if verifier is None:
        raise DataError(
            f"row {row.get('id')!r}: has no verifiable `answer` ({', '.join(VERIFIERS)}, or a function call)"
        )
    return verifier(prompt, completion, row)


SCORES: dict[str, ScoreFunction] = {
    "verified": score_verified,
    "function_call": function_call,
    "valid_call": valid_call,
    "key": key,
    "regex": regex,
    "schema": schema,
    "code": code,
    "sql": sql,
    "not_degenerate": not_degenerate,
    "constraints": constraints_strict,
    "constraints_loose": constraints_loose,
    "constraints_share": constraints_share,
}


def get_score_function(name: str) -> ScoreFunction:
    """Return the score function of a name.

    Errors: UserError for an unknown name.
    """
    if name not in SCORES:
        raise UserError(f"unknown score function {name!r}; known: {', '.join(sorted(SCORES))}")
    return SCORES[name]
