"""What the shapes share: the fields that every row may have, and what is left over."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from llmworks.types import Json, Message

Row = dict[str, Any]


def common(raw: Json, shape: str, used: Collection[str], variant: Json | None = None) -> Row:
    """id, group, tools and answer of a raw row; all other fields that the shape did not use go into `extra`."""
    tools: Any = raw.get("tools") or []
    as_text = isinstance(tools, str)
    if as_text:
        try:
            tools = json.loads(tools.strip() or "[]")
        except ValueError as error:
            raise ValueError(f"`tools` is not JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of functions")
    known = ("id", "group", "tools", "answer")
    extra: Json = {"shape": shape, **(variant or {})}
    left = {key: value for key, value in raw.items() if key not in used and key not in known}
    if left:
        extra["fields"] = left
    if "tools" in raw:
        extra["tools"] = "text" if as_text else "wrapped" if tools and all("function" in tool for tool in tools) else "plain"
    extra["given"] = [key for key in ("id", "group", "answer") if key in raw]
    return {
        "id": _name(raw.get("id")), "group": _name(raw.get("group")), "tools": [tool.get("function", tool) for tool in tools], "answer": raw.get("answer"), "extra": extra,
    }  # fmt: skip


def _name(value: Any) -> str:
    return "" if value is None else str(value)


def restored(row: Row, shape: str) -> Json:
    """What `common` took from a raw row of this shape, to be put back; of a row of another shape, its id, group, tools and answer."""
    extra = row.get("extra") or {}
    given = extra.get("given", []) if extra.get("shape") == shape else ["id", "group", *(["answer"] if row.get("answer") is not None else [])]
    out: Json = {**{key: row[key] for key in given}, **extra.get("fields", {})}
    form = extra.get("tools") if extra.get("shape") == shape else "plain" if row.get("tools") else None
    if form == "text":
        out["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    elif form == "wrapped":
        out["tools"] = [{"type": "function", "function": tool} for tool in row["tools"]]
    elif form == "plain":
        out["tools"] = row["tools"]
    return out


def complete(messages: Sequence[Message], shape: str) -> None:
    """ValueError when turns have what a shape cannot say: that an answer is not learned, or who speaks."""
    for number, message in enumerate(messages, 1):
        if not message.weight:
            raise ValueError(f"turn {number} has weight 0, so it is not learned; {shape} cannot say that")
        if message.name and message.role != "tool":
            raise ValueError(f"turn {number} has the name {message.name!r}; {shape} has no place for it")


def text(raw: Json, key: str) -> str:
    """A field that must be text. ValueError when it is not."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be text, not {type(value).__name__}")
    return value
