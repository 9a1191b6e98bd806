"""ChatML format: conversations rendered in `text` as `<|im_start|>ROLE`, a line break, the content, `<|im_end|>`."""

from __future__ import annotations

import re

from llmworks.core.types import ROLES, Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import Row, check_representable, convert_common, get_string, restore_fields

START, END = "<|im_start|>", "<|im_end|>"
TURN = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)


def matches(raw: Json) -> bool:
    """Return whether `text` begins with a ChatML turn."""
    return isinstance(raw.get("text"), str) and raw["text"].lstrip().startswith(START)


def read(raw: Json) -> Row:
    """Convert to a chat row. ValueError for an unknown role, an unterminated turn, or text between turns."""
    given = get_string(raw, "text")
    messages: list[Message] = []
    stray = TURN.sub("", given).strip()
    for turn in TURN.finditer(given):
        role, content = turn[1].strip(), turn[2]
        if role not in ROLES:
            raise ValueError(f"turn {len(messages) + 1} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        if START in content:
            raise ValueError(f"turn {len(messages) + 1} is not terminated: {END} is missing before the next {START}")
        messages.append(Message(role, content))
    if stray:
        raise ValueError(f"text outside of turns, or a turn is not terminated: {stray[:40]!r}")
    return {**convert_common(raw, "chatml", ("text",)), "messages": messages_to_json(messages)}


def write(row: Row) -> Json:
    """Convert to the raw row. ValueError for tool calls, or content with ChatML control tokens."""
    messages = list(messages_from_json(row["messages"]))
    if row.get("tools") or any(m.tool_calls for m in messages):
        raise ValueError("ChatML text cannot hold tools")
    check_representable(messages, "ChatML text")
    if any(mark in m.content for m in messages for mark in (START, END)):
        raise ValueError(f"a turn's content contains {START} or {END}")
    return {**restore_fields(row, "chatml"), "text": "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages)}
