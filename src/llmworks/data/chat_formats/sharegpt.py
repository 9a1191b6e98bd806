"""ShareGPT format: `conversations`, a list of turns with `from` and `value` (Vicuna, OpenHermes, LLaMA-Factory)."""

from __future__ import annotations

import json
from dataclasses import replace

from llmworks.core.types import Json, Message, ToolCall, get_extra_fields, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import (
    LOSS_FLAG_KEYS,
    Row,
    check_representable,
    convert_common,
    get_string,
    get_weight,
    restore_fields,
)

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def matches(raw: Json) -> bool:
    """Return whether a row has `conversations` whose turns have `from`."""
    turns = raw.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def read(raw: Json) -> Row:
    """Convert to a chat row. ValueError for an unknown speaker, a value that is not a string, or a call not in JSON."""
    turns = raw["conversations"]
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("`conversations` must be a list of turns, each with from and value")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        message = to_message(turn, number)
        last = messages[-1] if messages else None
        if message.tool_calls and last and last.tool_calls and last.weight == message.weight:  # parallel calls
            messages[-1] = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
        else:
            messages.append(message)
    has_system_field = isinstance(raw.get("system"), str) and bool(raw["system"].strip())
    if has_system_field:
        messages.insert(0, Message("system", raw["system"]))
    variant: Json = {"system_apart": True} if has_system_field else {}
    return {
        **convert_common(raw, "sharegpt", ("conversations", "system"), variant),
        "messages": messages_to_json(messages),
    }


def to_message(turn: Json, number: int = 1) -> Message:
    """Convert a turn to a message."""
    speaker = str(turn.get("from"))
    role = ROLES.get(speaker.lower())
    if role is None:
        raise ValueError(f"turn {number} is from {speaker!r}; known: {', '.join(ROLES)}")
    try:
        value = get_string(turn, "value")
    except ValueError as error:
        raise ValueError(f"turn {number}: {error}") from None
    try:
        weight = get_weight(turn)
    except ValueError as error:
        raise ValueError(f"turn {number}: {error}") from None
    known = ("from", "value", *(key for key in LOSS_FLAG_KEYS if isinstance(turn.get(key), bool)))
    extra = get_extra_fields({key: value for key, value in turn.items() if key not in known})
    if speaker.lower() not in ("function_call", "function_calls"):
        return Message(role, value, weight=weight, extra=extra)
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        made = tuple(
            ToolCall(
                str(call["name"]),
                call.get("arguments") if isinstance(call.get("arguments"), dict) else json.loads(call["arguments"]),
            )
            for call in calls
        )
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"turn {number} is a function_call, but its value is not a JSON object with name and arguments"
        ) from None
    return Message("assistant", "", made, weight=weight, extra=extra)


def from_message(message: Message) -> Json:
    """Convert a message to a turn."""
    extra = message.extra_fields
    if message.tool_calls:
        calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
        return {
            **extra,
            "from": "function_call",
            "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False),
        }
    return {**extra, "from": NAMES[message.role], "value": message.content}


def write(row: Row) -> Json:
    """Convert to the raw row. ValueError for a turn with both text and tool calls, which the format cannot hold."""
    messages = list(messages_from_json(row["messages"]))
    if any(m.tool_calls and m.content.strip() for m in messages):
        raise ValueError("a turn has text and tool calls; the ShareGPT format cannot hold both")
    check_representable([replace(m, weight=1, extra="") for m in messages], "the ShareGPT format")  # it does hold these
    extra = row.get("extra") or {}
    out = restore_fields(row, "sharegpt")
    if extra.get("shape") == "sharegpt" and extra.get("system_apart") and messages[0].role == "system":
        out["system"] = messages.pop(0).content
    return {**out, "conversations": [from_message(m) | ({} if m.weight else {"weight": 0}) for m in messages]}
