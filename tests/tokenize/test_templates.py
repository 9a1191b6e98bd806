"""Templates: the mask covers what is learned and nothing else; the tool-aware template renders the training prompt."""

from __future__ import annotations

from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_tokenizer

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Message, ToolCall, messages_from_json, messages_to_json
from llmworks.tokenize.chat.templates import (
    add_tool_support,
    can_render_tools,
    encode,
    flatten_tools,
    parse_tool_calls,
    render_masked,
    render_prompt,
    render_text,
    render_tool_call,
)

TURNS = (
    Message("system", "be brief"),
    Message("user", "hi 12"),
    Message("assistant", "yo"),
    Message("user", "again"),
    Message("assistant", "ok 谢谢"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_mask_covers_assistant_turns_with_their_end(tokenizer: Any) -> None:
    rendered = render_masked(tokenizer, TURNS)
    learned = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    assert learned == "yo<|im_end|>ok 谢谢<|im_end|>"


def test_ids_are_those_of_the_whole_text(tokenizer: Any) -> None:
    rendered = render_masked(tokenizer, TURNS)
    assert rendered.ids == encode(tokenizer, render_text(tokenizer, TURNS, generation_prompt=False))


def test_generation_sees_a_prefix_of_training(tokenizer: Any) -> None:
    rendered = render_masked(tokenizer, TURNS)
    for i, turn in enumerate(TURNS):
        if turn.role == "assistant":
            prompt = render_prompt(tokenizer, TURNS[:i])
            assert rendered.ids[: len(prompt)] == prompt
            assert rendered.mask[len(prompt)] == 1
            assert rendered.mask[len(prompt) - 1] == 0


def test_template_that_rewrites_history_is_refused() -> None:
    rewriting = make_tokenizer("{% for m in messages %}{{ m['content'] if loop.last else 'x' }}{% endfor %}")
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        render_masked(rewriting, TURNS)


def test_missing_template_and_refusing_template() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        render_text(make_tokenizer(None), TURNS)
    with pytest.raises(RequestError, match="only users"):
        render_text(make_tokenizer("{{ raise_exception('only users') }}"), TURNS)


def test_tool_aware_changes_nothing_without_tools(tokenizer: Any) -> None:
    aware = make_tokenizer(add_tool_support(TEMPLATE))
    assert render_text(aware, TURNS) == render_text(tokenizer, TURNS)
    assert add_tool_support(aware.chat_template) == aware.chat_template
    assert can_render_tools(aware)
    assert not can_render_tools(tokenizer)


def test_tool_aware_template_renders_the_training_prompt_for_all_of_bfcl(
    bfcl_rows: list[dict[str, Any]], tokenizer: Any
) -> None:
    aware = make_tokenizer(add_tool_support(TEMPLATE))
    for row in bfcl_rows:
        given = messages_from_json(row["messages"])
        stored = flatten_tools(given, row["tools"])
        assert parse_tool_calls(stored[-1].content)[1] == given[-1].tool_calls
        tools = [{"type": "function", "function": f} for f in row["tools"]]
        assert render_text(aware, given, tools=tools, generation_prompt=False) == render_text(
            tokenizer, stored, generation_prompt=False
        )


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        {"name": "f"},
        {"name": "f", "description": None, "parameters": None},
        {
            "name": "f",
            "description": 'quo"te',
            "parameters": {
                "properties": {
                    "items": {"type": "array", "items": {"type": "string"}},
                    "u": {"type": ["string", "null"], "enum": ["é", 1]},
                },
                "required": ["u"],
            },
        },
    ],
)
def test_template_and_python_agree_on_odd_tools(tool: dict[str, Any], tokenizer: Any) -> None:
    aware = make_tokenizer(add_tool_support(TEMPLATE))
    turns = (Message("system", "s"), Message("user", "u"))
    assert render_text(aware, turns, tools=(tool,)) == render_text(tokenizer, flatten_tools(turns, (tool,)))


def test_calls_are_parsed_back() -> None:
    calls = (ToolCall("a", {"x": [1, "é", {"y": None}]}), ToolCall("b.c", {}))
    assert parse_tool_calls("sure " + "".join(map(render_tool_call, calls))) == ("sure", calls)
    assert parse_tool_calls("no call") == ("no call", ())
    broken = '<tool_call>{"name": "a", "arguments": {</tool_call>'
    assert parse_tool_calls(broken) == (broken, ())
    assert parse_tool_calls('<tool_call>{"name": "a", "arguments": {"x": 1}}')[1] == (ToolCall("a", {"x": 1}),)


def test_messages_survive_storage() -> None:
    messages = (
        Message("user", "u"),
        Message("assistant", "", (ToolCall("f", {"a": 1}, "id1"),)),
        Message("tool", "42", tool_call_id="id1"),
    )
    assert messages_from_json(messages_to_json(messages)) == messages


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"role": "user"}, "neither content nor tool calls"),
        ({"role": "user", "content": 3}, "must be a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "not JSON"),
    ],
)
def test_bad_turns_are_named(turn: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        messages_from_json([turn])
