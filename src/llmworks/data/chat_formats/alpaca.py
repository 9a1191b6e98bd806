"""Alpaca format: `instruction`, optional `input`, `output`, optional `system` and `history` (LLaMA-Factory)."""

from __future__ import annotations

from llmworks.core.types import Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import Row, common, complete, restored, text

USED = ("instruction", "input", "output", "system", "history")


def matches(raw: Json) -> bool:
    """Return whether a row has an instruction and an output."""
    return "instruction" in raw and "output" in raw


def read(raw: Json) -> Row:
    """Convert to a chat row; the input is appended to the instruction. ValueError for a field that is not a string."""
    instruction, output = text(raw, "instruction"), text(raw, "output")
    extended = raw.get("input") or ""
    if not isinstance(extended, str):
        raise ValueError(f"`input` must be a string, not {type(extended).__name__}")
    messages: list[Message] = []
    if raw.get("system"):
        messages.append(Message("system", text(raw, "system")))
    for number, pair in enumerate(raw.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise ValueError(f"`history` {number} must be a pair of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = f"{instruction}\n\n{extended}" if extended and instruction else instruction or extended
    messages += [Message("user", asked), Message("assistant", output)]
    variant: Json = {"input": len(extended)} if extended and instruction else {}
    return {**common(raw, "alpaca", USED, variant), "messages": messages_to_json(messages)}


def write(row: Row) -> Json:
    """Convert to the raw row.

    ValueError for a conversation with tools, or one whose user and assistant turns do not alternate.
    """
    messages = list(messages_from_json(row["messages"]))
    extra = row.get("extra") or {}
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    roles = [m.role for m in messages]
    if (
        row.get("tools")
        or any(m.tool_calls for m in messages)
        or roles != ["user", "assistant"] * (len(roles) // 2)
        or not roles
    ):
        raise ValueError("the Alpaca format holds only alternating user and assistant turns, without tools")
    asked, answered = messages[-2].content, messages[-1].content
    history = [[messages[i].content, messages[i + 1].content] for i in range(0, len(messages) - 2, 2)]
    complete(messages, "the Alpaca format")
    size = extra.get("input", 0)
    asked, extended = (asked[: -size - 2], asked[-size:]) if size else (asked, "")
    out: Json = {**restored(row, "alpaca"), "instruction": asked, "input": extended, "output": answered}
    return out | ({"system": system} if system else {}) | ({"history": history} if history else {})
