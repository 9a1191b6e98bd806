"""Score a function call against accepted values with the rules of the Berkeley Function Calling Leaderboard (BFCL v4).

AST check for Python: one call, the right name, all required arguments, none unknown; every value of the declared type
and among the accepted ones. Strings are compared without case, spaces and the punctuation `, . / - _ * ^`. An integer
is accepted for a number, but not the reverse. The verdicts agree with BFCL's own checker on the recorded cases in the
tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.tokenize.chat.templates import parse_tool_calls

_PYTHON_TYPE: dict[str, type] = {
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "string": str,
    "object": dict,
}
OMITTED = ""


def function_call(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the completion is exactly one accepted call.

    `row` has `tools` (JSON schema) and `answer` ({name: {argument: accepted values}}).
    """
    ((name, accepted),) = get_accepted_call(row).items()
    _, calls = parse_tool_calls(completion)
    if len(calls) != 1:
        return Score(0.0, f"{len(calls)} calls, expected one")
    call = calls[0]
    if call.name != name:
        return Score(0.0, f"called {call.name!r}, expected {name!r}")
    function = next(f for f in (tool.get("function", tool) for tool in row["tools"]) if f["name"] == name)
    problem = check_arguments(call.arguments, accepted, function["parameters"])
    return Score(0.0, problem) if problem else Score(1.0)


def valid_call(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the completion is one call of a tool of the row whose arguments match its JSON schema.

    The values need not be correct.
    """
    import jsonschema_rs

    _, calls = parse_tool_calls(completion)
    if len(calls) != 1:
        return Score(0.0, f"{len(calls)} parseable calls, expected one")
    call = calls[0]
    function = next(
        (f for f in (tool.get("function", tool) for tool in row.get("tools") or []) if f["name"] == call.name), None
    )
    if function is None:
        return Score(0.0, f"called {call.name!r}, which is not a tool of the row")
    parameters = function.get("parameters") or {}
    unknown = sorted(set(call.arguments) - set(parameters.get("properties", {})))
    if unknown:
        return Score(0.0, f"argument {unknown[0]!r} is unknown")
    try:
        problem = next(jsonschema_rs.validator_for(dict(parameters), offline=True).iter_errors(call.arguments), None)
    except jsonschema_rs.ValidationError as error:
        raise DataError(
            f"row {row.get('id')!r}: the parameters of {call.name!r} are not a valid JSON schema ({error.message})"
        ) from None
    return (
        Score(0.0, f"{'.'.join(map(str, problem.instance_path)) or 'arguments'}: {problem.message}"[:200])
        if problem
        else Score(1.0)
    )


def get_accepted_call(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row's accepted call.

    Errors: DataError when its `answer` is not one call of one of its `tools`.
    """
    answer, tools = row.get("answer"), row.get("tools") or []
    if (
        not isinstance(answer, Mapping)
        or len(answer) != 1
        or next(iter(answer)) not in [t.get("function", t).get("name") for t in tools]
    ):
        raise DataError(
            f"row {row.get('id')!r}: `answer` must be {{NAME: {{ARGUMENT: [accepted values]}}}} with NAME among the"
            " row's `tools`"
        )
    return answer


def check_arguments(
    arguments: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]
) -> str:
    """Return what is wrong with the arguments, or an empty string."""
    properties = parameters.get("properties", {})
    for name in parameters.get("required", []):
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return f"argument {name!r} is unknown"
        problem = check_value(value, accepted[name], properties[name])
        if problem:
            return f"argument {name!r}: {problem}"
    for name, values in accepted.items():
        if name not in arguments and OMITTED not in values:
            return f"argument {name!r} is missing"
    return ""


def check_value(value: Any, accepted: Sequence[Any], spec: Mapping[str, Any]) -> str:
    """Return what is wrong with one value, or an empty string."""
    declared = spec.get("type", "string")
    kind: type = _PYTHON_TYPE.get(declared, str) if isinstance(declared, str) else type(value)
    if kind is float and type(value) is int:
        value = float(value)
    example = next((v for v in accepted if v != OMITTED), None)
    # An accepted value of another type than declared is a variable: then its own type applies.
    as_variable = example is not None and type(example) is not kind
    if type(value) is kind:
        if (
            kind is list
            and "items" in spec
            and not _has_typed_items(value, accepted, _PYTHON_TYPE.get(spec["items"].get("type", "string"), str))
        ):
            return f"an item has the wrong type in {value!r}"
    elif example is None or type(value) is not type(example):
        return f"{value!r} is not of type {spec.get('type', 'any')}"
    else:
        as_variable = True
    if as_variable and not isinstance(value, str):
        return "" if value in accepted else f"{value!r} is not among {list(accepted)}"
    if not as_variable and isinstance(value, dict):
        return (
            ""
            if any(_is_accepted_object(value, a) for a in accepted if isinstance(a, dict))
            else f"{value!r} is not among {list(accepted)}"
        )
    if not as_variable and isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        fits = any(
            len(value) == len(a) and all(_is_accepted_object(v, w) for v, w in zip(value, a, strict=True))
            for a in accepted
            if isinstance(a, list)
        )
        return "" if fits else f"{value!r} is not among {list(accepted)}"
    if any(is_same(value, a) for a in accepted):
        return ""
    return f"{value!r} is not among {list(accepted)}"


def _has_typed_items(value: Any, accepted: Sequence[Any], kind: type) -> bool:
    """Return whether every item has the declared type, or the item type of some accepted list."""
    for candidate in accepted:
        if not isinstance(candidate, list):
            return True
        example = next((v for v in candidate if v != OMITTED), None)
        if all(type(v) is kind or (example is not None and type(v) is type(example)) for v in value):
            return True
    return False


def _is_accepted_object(value: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether an object has no unknown key, only accepted values, and all required keys."""
    if any(key not in accepted or not any(is_same(item, a) for a in accepted[key]) for key, item in value.items()):
        return False
    return all(key in value or OMITTED in values for key, values in accepted.items())


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are equal after normalization, one level into lists."""
    if isinstance(a, list) and isinstance(b, list):
        return [normalize(v) for v in a] == [normalize(v) for v in b]
    return bool(normalize(a) == normalize(b))


def normalize(value: Any) -> Any:
    """Return a string without case, spaces and light punctuation, with single quotes as double ones.

    Any other value is unchanged.
    """
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
