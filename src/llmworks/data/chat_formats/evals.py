"""OpenAI evals format: `input`, a list of turns, and `ideal`, the reference answer or a list of accepted ones."""

from __future__ import annotations

from dataclasses import replace

from llmworks.core.types import Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import Row, convert_common, restore_fields


def matches(raw: Json) -> bool:
    """Return whether a row has `ideal`, and `input` as a list of turns."""
    turns = raw.get("input")
    return "ideal" in raw and isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) for turn in turns)


def read(raw: Json) -> Row:
    """Convert to a chat row.

    A final system turn (the question) becomes a user turn. ValueError for an answer that is not a string.
    """
    prompt = list(messages_from_json(raw["input"]))
    if prompt[-1].role == "system":
        prompt[-1] = replace(prompt[-1], role="user")
    ideal = raw["ideal"][0] if isinstance(raw["ideal"], list) and raw["ideal"] else raw["ideal"]
    if not isinstance(ideal, str):
        raise ValueError(f"`ideal` must be a string or a list of strings, not {type(ideal).__name__}")
    row = convert_common({k: v for k, v in raw.items() if k not in ("input", "ideal")}, "evals", ())
    return {**row, "messages": messages_to_json([*prompt, Message("assistant", ideal)]), "answer": raw["ideal"]}


def write(row: Row) -> Json:
    """Convert to the raw row. ValueError for a row without an answer."""
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise ValueError("does not end with an assistant turn of text, so there is no `ideal`")
    key = row.get("answer") if isinstance(row.get("answer"), (str, list)) else messages[-1]["content"]
    return {
        **{k: v for k, v in restore_fields(row, "evals").items() if k != "answer"},
        "input": messages[:-1],
        "ideal": key,
    }
