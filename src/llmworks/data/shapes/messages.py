"""OpenAI's and Hugging Face's shape: `messages`, a list of turns with role and content, optional `tools`."""

from __future__ import annotations

from llmworks.data.shapes.fields import Row, common, restored
from llmworks.types import Json, messages_from_json, messages_to_json

KEYS = ("messages", "conversation", "conversations", "dialog", "turns")


def matches(raw: Json) -> bool:
    """A list of turns that have a role, under a usual name."""
    return _key(raw) != ""


def _key(raw: Json) -> str:
    for key in KEYS:
        turns = raw.get(key)
        if isinstance(turns, list) and (key == "messages" or (turns and isinstance(turns[0], dict) and "role" in turns[0])):
            return key
    return ""


def read(raw: Json) -> Row:
    """A chat row. ValueError for an unknown role, content that is no text, or a broken call."""
    key = _key(raw)
    turns = raw[key]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`{key}` must be a list of turns, each with role and content")
    row = common(raw, "messages", (key,), {"key": key} if key != "messages" else None)
    return {**row, "messages": messages_to_json(messages_from_json(turns))}


def write(row: Row) -> Json:
    """The raw row."""
    extra = row.get("extra") or {}
    key = extra.get("key", "messages") if extra.get("shape") == "messages" else "messages"
    return {**restored(row, "messages"), key: row["messages"]}
