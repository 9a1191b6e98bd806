"""Score the form of an answer: a regular expression that it must match, or a JSON schema that its JSON must fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.errors import DataError
from llmworks.score.extract import json_value
from llmworks.types import Message, Score


def regex(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """1 when `answer.regex` is found in the answer (`^` and `$` are its ends). DataError for a row without a pattern, or a broken one."""
    answer = row.get("answer")
    pattern = answer.get("regex") if isinstance(answer, Mapping) else None
    if not isinstance(pattern, str):
        raise DataError(f'row {row.get("id")!r}: `answer` must be {{"regex": PATTERN}}')
    try:
        found = re.search(pattern, completion.strip())
    except re.error as error:
        raise DataError(f"row {row.get('id')!r}: answer.regex is no regular expression ({error})") from None
    return Score(1.0) if found else Score(0.0, f"does not match {pattern[:80]!r}")


def schema(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """1 when the answer's JSON fits `answer.schema`. DataError for a row without a schema, or a broken one."""
    import jsonschema

    answer = row.get("answer")
    wanted = answer.get("schema") if isinstance(answer, Mapping) else None
    if not isinstance(wanted, (Mapping, bool)):
        raise DataError(f'row {row.get("id")!r}: `answer` must be {{"schema": JSON SCHEMA}}')
    validator = jsonschema.validators.validator_for(wanted, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise DataError(f"row {row.get('id')!r}: answer.schema is no JSON schema ({error.message})") from None
    try:
        value = json_value(completion)
    except ValueError as error:
        return Score(0.0, str(error))
    problem = next(iter(sorted(validator(wanted).iter_errors(value), key=lambda e: list(map(str, e.absolute_path)))), None)
    return Score(0.0, f"{'.'.join(map(str, problem.absolute_path)) or 'value'}: {problem.message}"[:200]) if problem else Score(1.0)
