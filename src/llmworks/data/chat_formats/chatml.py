"""Conversations as ChatML text in `text`: `<|im_start|>ROLE` , a line break, the content, `<|im_end|>`."""

from __future__ import annotations

import re

from llmworks.core.types import ROLES, Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import Row, common, complete, restored, text

START, END = "<|im_start|>", "<|im_end|>"
TURN = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)


def matches(raw: Json) -> bool:
    """`text` begins with a turn."""
    return isinstance(raw.get("text"), str) and raw["text"].lstrip().startswith(START)


def read(raw: Json) -> Row:
    """A chat row. ValueError for an unknown role, a turn that never ends, or text between turns."""
    given = text(raw, "text")
    messages: list[Message] = []
    stray = TURN.sub("", given).strip()
    for turn in TURN.finditer(given):
        role, content = turn[1].strip(), turn[2]
        if role not in ROLES:
            raise ValueError(f"turn {len(messages) + 1} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        if START in content:
            raise ValueError(f"turn {len(messages) + 1} never ends: {END} is missing before the next {START}")
        messages.append(Message(role, content))
    if stray:
        raise ValueError(f"text stands outside of turns, or a turn never ends: {stray[:40]!r}")
    return {**common(raw, "chatml", ("text",)), "messages": messages_to_json(messages)}


def write(row: Row) -> Json:
    """The raw row. ValueError for tool calls, or text that holds ChatML's own marks."""
    messages = list(messages_from_json(row["messages"]))
    if row.get("tools") or any(m.tool_calls for m in messages):
        raise ValueError("ChatML text has no place for tools")
    complete(messages, "ChatML text")
    if any(mark in m.content for m in messages for mark in (START, END)):
        raise ValueError(f"a turn holds {START} or {END}, which would end it")
    return {**restored(row, "chatml"), "text": "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages)}
