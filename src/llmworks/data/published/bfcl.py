"""Read the Berkeley Function Calling Leaderboard (BFCL): types become JSON schema, accepted answers one tool call.

Source: the BFCL v4 data files (`question`, `function`, `ground_truth`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Json, Message, ToolCall, messages_from_json, messages_to_json
from llmworks.data.store.jsonl import RejectedRows, read_jsonl
from llmworks.data.store.rows import Row

_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
OMITTED = ""  # among an argument's accepted values: the argument is optional


def rows(folder: Path, rejected: RejectedRows) -> list[Row]:
    """Read chat rows of a BFCL category: question, functions and the expected call."""
    if not folder.is_dir():
        raise DataError(f"{folder}: format bfcl takes a directory with questions.jsonl and answers.jsonl")
    answers = {answer.get("id"): answer for _, answer in read_jsonl(folder / "answers.jsonl", rejected)}
    found: list[Row] = []
    seen: set[str] = set()
    for line, question in read_jsonl(folder / "questions.jsonl", rejected):
        try:
            messages, functions, call, accepted = convert_row(question, answers[question.get("id")])
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
            rejected.add(
                "questions.jsonl",
                line,
                f"not a BFCL question with an answer ({type(error).__name__}: {error})",
                str(question),
            )
            continue
        if question["id"] in seen:
            rejected.add("questions.jsonl", line, f"duplicate id {question['id']!r}", str(question))
            continue
        seen.add(question["id"])
        full = messages_to_json((*messages, Message("assistant", "", (call,))))
        found.append(
            {
                "id": question["id"],
                "group": call.name,
                "messages": full,
                "tools": functions,
                "answer": accepted,
                "extra": {},
            }
        )
    return found


def to_json_schema(spec: Any) -> Any:
    """Convert a BFCL parameter description to JSON schema; BFCL uses Python's names dict, float, tuple and any."""
    if not isinstance(spec, dict):
        return spec
    out: Json = {}
    for key, value in spec.items():
        if key == "type" and isinstance(value, str):
            if value != "any":
                out[key] = _TYPES.get(value, value)
        elif key == "properties":
            out[key] = {name: to_json_schema(inner) for name, inner in value.items()}
        elif key == "items":
            out[key] = to_json_schema(value)
        else:
            out[key] = value
    return out


def choose_call(accepted: Json, function: Json, question: str = "") -> ToolCall:
    """Choose one call among the accepted ones: the first listed value of every argument.

    An optional argument is omitted unless the question states its value. Otherwise a model trained on the rows would
    drop stated values that an answer needs.
    """
    ((name, arguments),) = accepted.items()
    required = function["parameters"].get("required", [])
    chosen: Json = {}
    for argument, values in arguments.items():
        real = [v for v in values if v != OMITTED]
        stated = [v for v in real if _is_stated(question, v)]
        if real and (OMITTED not in values or argument in required):
            chosen[argument] = _first_accepted(real[0])
        elif stated:
            chosen[argument] = stated[0]
        elif not real and argument in required:
            chosen[argument] = OMITTED
    return ToolCall(name, chosen)


def _is_stated(question: str, value: Any) -> bool:
    """Return whether a string or number occurs in the question as a whole word."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    return re.search(rf"(?<![\w.]){re.escape(str(value))}(?!\w|\.\d)", question, re.IGNORECASE) is not None


def _first_accepted(value: Any) -> Any:
    """Take the first accepted value of every key inside an object, where BFCL lists them; omit optional keys."""
    if isinstance(value, dict):
        return {
            k: _first_accepted(v[0]) if isinstance(v, list) and v else v
            for k, v in value.items()
            if not (isinstance(v, list) and OMITTED in v)
        }
    if isinstance(value, list):
        return [_first_accepted(v) if isinstance(v, dict) else v for v in value]
    return value


def convert_row(question: Json, answer: Json) -> tuple[tuple[Message, ...], list[Json], ToolCall, Json]:
    """Return (messages without the answer, functions as JSON schema, expected call, accepted calls) of one question."""
    functions = [{**f, "parameters": to_json_schema(f["parameters"])} for f in question["function"]]
    messages = messages_from_json([turn for turns in question["question"] for turn in turns])
    accepted = answer["ground_truth"][0]
    function = next(f for f in functions if f["name"] == next(iter(accepted)))
    question_text = next((m.content for m in reversed(messages) if m.role == "user"), "")
    return messages, functions, choose_call(accepted, function, question_text), accepted
