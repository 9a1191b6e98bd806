"""Render a task's templates from a row: Jinja as in the lm-evaluation-harness, sandboxed.

Does not know tasks or models.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import regex as expressions

from llmworks.core.errors import DataError

SECONDS = 2.0  # timeout of one regular expression in a template
NAME = re.compile(r"[A-Za-z_]\w*")


@cache
def _create_environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda string, pattern, repl, count=0: expressions.sub(
        pattern, repl, string, count=count, timeout=SECONDS
    )
    return environment


@cache
def _compile(template: str) -> Any:
    return _create_environment().from_string(template)


def render(template: str, row: Mapping[str, Any]) -> Any:
    """Render a template from a row; the name of a field returns that field's value, of whatever type.

    DataError naming row and template.
    """
    if template in row:
        if row[template] is None:
            raise DataError(f"row {row.get('id', '?')!r}: the field {template!r} is null")
        return row[template]
    if NAME.fullmatch(template):
        raise DataError(
            f"row {row.get('id', '?')!r}: has no field {template!r}; fields: {', '.join(sorted(map(str, row)))[:160]}"
        )
    try:
        return _compile(template).render(**row)
    except Exception as error:  # a template is a program and may fail in any way
        raise DataError(
            f"row {row.get('id', '?')!r}: the template {template[:60]!r} cannot be rendered"
            f" ({' '.join(str(error).split())[:160]})"
        ) from None


def render_string(template: str, row: Mapping[str, Any]) -> str:
    """Render a template as text."""
    value = render(template, row) if template else ""
    return _check_encodable(value if isinstance(value, str) else str(value), row)


def _check_encodable(text: str, row: Mapping[str, Any]) -> str:
    """Check that a text can be encoded as UTF-8. DataError for lone surrogates, as in broken exports."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"row {row.get('id', '?')!r}: contains a lone surrogate, which is not a valid character"
        ) from None
    return text


def render_list(template: str | list[str], row: Mapping[str, Any]) -> list[str]:
    """Render a list of strings: given as is, a field of the row, or a Python or JSON list that a template writes.

    DataError for anything else.
    """
    if isinstance(template, list):
        return template
    value = render(template, row)
    value = _parse_literal(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, (str, int, float)) for v in value):
        raise DataError(
            f"row {row.get('id', '?')!r}: {template[:60]!r} must give a list of strings, but gives {str(value)[:60]!r}"
        )
    return [_check_encodable(str(v), row) for v in value]


def render_value(template: Any, row: Mapping[str, Any]) -> Any:
    """Render a template and parse lists; of a mapping, render all its templates."""
    if isinstance(template, dict):
        return {
            key: render_value(item, row)
            if isinstance(item, dict)
            else render(item, row)
            if isinstance(item, str)
            else item
            for key, item in template.items()
        }
    if not isinstance(template, str):
        return template
    found = render(template, row) if template else ""
    if isinstance(found, str) and template not in row and len(found) >= 2 and found[0] == "[" and found[-1] == "]":
        read = _parse_literal(found)
        return read if isinstance(read, list) else found
    return found


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
