"""OpenAI and Hugging Face format: `messages`, a list of turns with role and content, optional `tools`."""

from __future__ import annotations

from llmworks.core.types import Json, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import LOSS_FLAG_KEYS, Row, convert_common, get_weight, restore_fields

KEYS = ("messages", "conversation", "conversations", "dialog", "turns")


def matches(raw: Json) -> bool:
    """Return whether a row has a list of turns with roles, under a usual name."""
    return _find_key(raw) != ""


def _find_key(raw: Json) -> str:
    for key in KEYS:
        turns = raw.get(key)
        if isinstance(turns, list) and (
            key == "messages" or (turns and isinstance(turns[0], dict) and "role" in turns[0])
        ):
            return key
    return ""


def read(raw: Json) -> Row:
    """Convert to a chat row. ValueError for an unknown role, content that is not a string, or a malformed call."""
    key = _find_key(raw)
    turns = raw[key]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`{key}` must be a list of turns, each with role and content")
    row = convert_common(raw, "messages", (key,), {"key": key} if key != "messages" else {})
    return {
        **row,
        "messages": messages_to_json(
            messages_from_json([normalize_turn(turn, number) for number, turn in enumerate(turns, 1)])
        ),
    }


def normalize_turn(turn: Json, number: int) -> Json:
    """Normalize a turn: legacy OpenAI function calls become tool calls, other trainers' loss flags become weights."""
    try:
        flags = [key for key in LOSS_FLAG_KEYS if isinstance(turn.get(key), bool)]
        turn = {**{key: value for key, value in turn.items() if key not in flags}, "weight": get_weight(turn)}
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None
    if turn.get("role") == "function":
        turn["role"] = "tool"
    if isinstance(turn.get("function_call"), dict):
        turn["tool_calls"] = [{"id": "", "type": "function", "function": turn["function_call"]}]
    if turn.get("content") is None and not turn.get("tool_calls"):
        others = [
            key
            for key, value in turn.items()
            if key not in ("role", "content", "weight", "name", "tool_calls") and value
        ]
        raise ValueError(
            f"message {number} ({turn.get('role')}) has neither content nor tool calls"
            + (f"; `{others[0]}` is not supported" if others else "")
        )
    return turn


def write(row: Row) -> Json:
    """Convert to the raw row."""
    extra = row.get("extra") or {}
    out = restore_fields(row, "messages")
    if extra.get("shape") != "messages" and out.get("tools"):
        out["tools"] = [{"type": "function", "function": tool} for tool in row["tools"]]  # OpenAI's format
    key = extra.get("key", "messages") if extra.get("shape") == "messages" else "messages"
    return {**out, key: row["messages"]}
