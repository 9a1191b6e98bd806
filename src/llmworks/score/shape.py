"""Score the format of a completion: a regular expression that it must match, or a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import regex as expressions

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.score.extract import extract_json

TIMEOUT = 2.0  # timeout of one match: some patterns backtrack exponentially


def regex(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when `answer.regex` is found in the completion (`^` and `$` are its ends) before the timeout.

    Errors: DataError for a row without a pattern, or with an invalid one.
    """
    answer = row.get("answer")
    pattern = answer.get("regex") if isinstance(answer, Mapping) else None
    if not isinstance(pattern, str):
        raise DataError(f'row {row.get("id")!r}: `answer` must be {{"regex": PATTERN}}')
    try:
        found = expressions.search(pattern, completion.strip(), timeout=TIMEOUT)
    except expressions.error as error:
        raise DataError(f"row {row.get('id')!r}: answer.regex is not a valid regular expression ({error})") from None
    except TimeoutError:
        return Score(0.0, f"takes longer than {TIMEOUT:g} s to match {pattern[:80]!r}")
    return Score(1.0) if found else Score(0.0, f"does not match {pattern[:80]!r}")


def schema(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the completion's JSON matches `answer.schema`.

    Errors: DataError for a row without a schema, or with one that is invalid or not self-contained.
    """
    import jsonschema_rs

    answer = row.get("answer")
    wanted = answer.get("schema") if isinstance(answer, Mapping) else None
    if not isinstance(wanted, (Mapping, bool)):
        raise DataError(f'row {row.get("id")!r}: `answer` must be {{"schema": JSON SCHEMA}}')
    try:
        validator = jsonschema_rs.validator_for(dict(wanted) if isinstance(wanted, Mapping) else wanted, offline=True)
    except jsonschema_rs.ValidationError as error:
        raise DataError(f"row {row.get('id')!r}: answer.schema is not a valid JSON schema ({error.message})") from None
    try:
        value = extract_json(completion)
    except ValueError as error:
        return Score(0.0, str(error))
    problem = min(validator.iter_errors(value), key=lambda e: list(map(str, e.instance_path)), default=None)
    return (
        Score(0.0, f"{'.'.join(map(str, problem.instance_path)) or 'value'}: {problem.message}"[:200])
        if problem
        else Score(1.0)
    )
