"""The function-call score agrees with BFCL's own checker on every recorded case, and is not fooled by form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmworks.core.types import ToolCall
from llmworks.data.store.rows import flatten_messages
from llmworks.score.function_call import check_arguments, function_call, valid_call
from llmworks.tokenize.chat.templates import render_tool_call

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "bfcl_cases.json").read_text())


def test_agrees_with_bfcl_on_every_case(bfcl_rows: list[dict[str, Any]]) -> None:
    rows = {r["id"]: r for r in bfcl_rows}
    assert len(CASES) == 1600
    wrong = []
    for case in CASES:
        row = rows[case["id"]]
        problem = check_arguments(case["arguments"], row["answer"][case["name"]], row["tools"][0]["parameters"])
        if (problem == "") != case["valid"]:
            wrong.append((case, problem))
    assert wrong == []


def test_every_reference_answer_is_right(bfcl_rows: list[dict[str, Any]]) -> None:
    for row in bfcl_rows:
        assert function_call((), flatten_messages(row)[-1].content, row).value == 1.0, row["id"]


ROW = {
    "tools": [
        {
            "name": "f",
            "parameters": {"properties": {"n": {"type": "integer"}, "x": {"type": "number"}}, "required": ["n"]},
        }
    ],
    "answer": {"f": {"n": [3], "x": [1.0, ""]}},
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (render_tool_call(ToolCall("f", {"n": 3})), True),
        ("Sure. " + render_tool_call(ToolCall("f", {"n": 3, "x": 1})), True),
        (render_tool_call(ToolCall("f", {"n": 3.0})), False),
        (render_tool_call(ToolCall("f", {"n": True})), False),
        (render_tool_call(ToolCall("f", {"n": "3"})), False),
        (render_tool_call(ToolCall("g", {"n": 3})), False),
        (render_tool_call(ToolCall("f", {"n": 3})) * 2, False),
        ('{"name": "f", "arguments": {"n": 3}}', False),
        ("<tool_call>f(n=3)</tool_call>", False),
        ("", False),
    ],
)
def test_form(text: str, right: bool) -> None:
    scored = function_call((), text, ROW)
    assert (scored.value == 1.0) == right
    assert bool(scored.reason) != right


def test_every_reference_answer_could_be_run(bfcl_rows: list[dict[str, Any]]) -> None:
    for row in bfcl_rows:
        scored = valid_call((), flatten_messages(row)[-1].content, row)
        assert scored.value == 1.0, (row["id"], scored.reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (render_tool_call(ToolCall("f", {"n": 7})), ""),  # a wrong answer that can be run
        (render_tool_call(ToolCall("f", {"n": 3, "x": 1})), ""),
        (render_tool_call(ToolCall("f", {"x": 1})), '"n" is a required property'),
        (render_tool_call(ToolCall("f", {"n": "3"})), 'n: "3" is not of type "integer"'),
        (render_tool_call(ToolCall("f", {"n": 3, "z": 1})), "argument 'z' is unknown"),
        (render_tool_call(ToolCall("g", {"n": 3})), "called 'g', which is not a tool of the row"),
        (render_tool_call(ToolCall("f", {"n": 3})) * 2, "2 parseable calls, expected one"),
        ('<tool_call>{"name": "f", "arguments": {"n": 3}</tool_call>', "0 parseable calls, expected one"),
    ],
)
def test_what_could_be_run(text: str, reason: str) -> None:
    scored = valid_call((), text, ROW)
    assert (scored.value == 1.0) == (reason == "")
    assert reason in scored.reason
