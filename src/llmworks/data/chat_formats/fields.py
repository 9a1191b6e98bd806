"""Shared code of the formats: fields that every row may have, and extra fields."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from llmworks.core.types import Json, Message, messages_from_json
from llmworks.tokenize.chat.tool_schemas import normalize_tool

Row = dict[str, Any]


def convert_common(raw: Json, format_name: str, used: Collection[str], variant: Json | None = None) -> Row:
    """Convert id, group, tools and answer of a raw row; other fields that the format did not use go into `extra`."""
    tools: Any = raw.get("tools") or []
    as_text = isinstance(tools, str)
    if as_text:
        try:
            tools = json.loads(tools.strip() or "[]")
        except ValueError as error:
            raise ValueError(f"`tools` is not JSON ({error})") from None
    if not isinstance(tools, list):
        raise ValueError("`tools` must be a list of functions")
    functions = [normalize_tool(tool) for tool in tools]
    known = ("id", "group", "tools", "answer")
    extra: Json = {"shape": format_name, **(variant or {})}
    left = {key: value for key, value in raw.items() if key not in used and key not in known}
    if left:
        extra["fields"] = left
    if "tools" in raw:
        extra["tools"] = (
            "text" if as_text else "wrapped" if tools and all("function" in tool for tool in tools) else "plain"
        )
    extra["given"] = [key for key in ("id", "group", "answer") if key in raw]
    return {
        "id": _to_string(raw.get("id")),
        "group": _to_string(raw.get("group")),
        "tools": functions,
        "answer": raw.get("answer"),
        "extra": extra,
    }


def _to_string(value: Any) -> str:
    return "" if value is None else str(value)


def restore_fields(row: Row, format_name: str) -> Json:
    """Restore the fields that were read from a raw row of this format; else id, group, tools and answer."""
    extra = row.get("extra") or {}
    given = (
        extra.get("given", [])
        if extra.get("shape") == format_name
        else ["id", "group", *(["answer"] if row.get("answer") is not None else [])]
    )
    out: Json = {**{key: row[key] for key in given}, **extra.get("fields", {})}
    form = extra.get("tools") if extra.get("shape") == format_name else "plain" if row.get("tools") else None
    if form == "text":
        out["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    elif form == "wrapped":
        out["tools"] = [{"type": "function", "function": tool} for tool in row["tools"]]
    elif form == "plain":
        out["tools"] = row["tools"]
    return out


LOSS_FLAG_KEYS = ("train", "training", "loss")  # other trainers' keys for the loss mask of a turn


def get_weight(turn: Json) -> int:
    """Return 1 for a turn that is trained on, 0 for a masked one.

    ValueError for any other weight: the trainers here do not support fractional weights.
    """
    weight = turn.get("weight")
    if weight not in (None, 0, 1) or isinstance(weight, str):
        raise ValueError(f"weight is {weight!r}, must be 0 or 1")
    marked = next((turn[key] for key in LOSS_FLAG_KEYS if isinstance(turn.get(key), bool)), True)
    return int(marked) if weight is None else int(weight)


def parse_prompt(raw: Json, key: str) -> tuple[list[Message], int, tuple[str, ...]]:
    """Build the prompt turns from a prompt field and the fields beside it.

    Returns (turns up to the answer, form of the field as in `parse_turns`, the other fields that were used). The order
    is system prompt, history, then context, question and input in one turn. ValueError for a field of an unexpected
    type.
    """
    turns, form = parse_turns(raw, key, "user")
    used: list[str] = []

    def take_field(*names: str) -> Any:
        name = next((name for name in names if name != key and raw.get(name)), "")
        used.extend([name] if name else [])
        return raw.get(name) if name else None

    system, above, below, history = (
        take_field("system", "system_prompt"),
        take_field("context"),
        take_field("input"),
        take_field("history"),
    )
    if form != -1 and (above or below or history):
        raise ValueError(f"`{used[-1]}` cannot be combined with a prompt of turns; move it into the turns")
    for value in (system, above, below):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"`{next(name for name in used if raw[name] is value)}` must be a string, not {type(value).__name__}"
            )
    if above or below:
        turns = [Message("user", "\n\n".join(filter(None, (above, turns[0].content, below))))]
    if history is not None:
        if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in history
        ):
            raise ValueError("`history` must be a list of pairs of strings")
        turns = [
            *(
                message
                for before, after in history
                for message in (Message("user", before), Message("assistant", after))
            ),
            *turns,
        ]
    if system:
        if turns and turns[0].role == "system":
            raise ValueError("has a system turn in the prompt and a separate system prompt")
        turns = [Message("system", system), *turns]
    return turns, form if not used else len(turns), tuple(used)


def parse_turns(raw: Json, key: str, role: str) -> tuple[list[Message], int]:
    """Parse a field into (messages, number of turns; -1 for a string). ValueError when it is neither."""
    value: Any = raw[key]
    if isinstance(value, str):
        return [Message(role, value)], -1
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return list(messages_from_json(value)), len(value)
    raise ValueError(f"`{key}` must be a string or a list of turns, not {type(value).__name__}")


def check_representable(messages: Sequence[Message], format_name: str) -> None:
    """Raise ValueError when turns have weights, names or other fields, which a format cannot hold."""
    for number, message in enumerate(messages, 1):
        if not message.weight:
            raise ValueError(f"turn {number} has weight 0 (masked from the loss); {format_name} cannot hold weights")
        if message.name and message.role != "tool":
            raise ValueError(f"turn {number} has the name {message.name!r}; {format_name} cannot hold names")
        if message.extra:
            raise ValueError(
                f"turn {number} has the fields {', '.join(map(repr, message.extra_fields))}, which {format_name} cannot"
                " hold; extra_turn_fields: drop_fields removes them"
            )


def get_string(raw: Json, key: str) -> str:
    """Return a string field. ValueError when it is not a string."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a string, not {type(value).__name__}")
    return value
