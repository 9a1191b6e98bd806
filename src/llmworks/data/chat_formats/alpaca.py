"""Alpaca format: `instruction`, optional `input`, `output`, optional `system` and `history` (LLaMA-Factory)."""

from __future__ import annotations

from llmworks.core.types import Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import Row, check_representable, convert_common, get_string, restore_fields

USED = ("instruction", "input", "output", "system", "history")


def matches(raw: Json) -> bool:
    """Return whether a row has an instruction and an output."""
    return "instruction" in raw and "output" in raw


def read(raw: Json) -> Row:
    """Convert to a chat row; the input is appended to the instruction. ValueError for a field that is not a string."""
    instruction, output = get_string(raw, "instruction"), get_string(raw, "output")
    extended = raw.get("input") or ""
    if not isinstance(extended, str):
        raise ValueError(f"`input` must be a string, not {type(extended).__name__}")
    messages: list[Message] = []
    if raw.get("system"):
        messages.append(Message("system", get_string(raw, "system")))
    for number, pair in enumerate(raw.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise ValueError(f"`history` {number} must be a pair of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = f"{instruction}\n\n{extended}" if extended and instruction else instruction or extended
    messages += [Message("user", question), Message("assistant", output)]
    variant: Json = {"input": len(extended)} if extended and instruction else {}
    return {**convert_common(raw, "alpaca", USED, variant), "messages": messages_to_json(messages)}


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
    question, answer = messages[-2].content, messages[-1].content
    history = [[messages[i].content, messages[i + 1].content] for i in range(0, len(messages) - 2, 2)]
    check_representable(messages, "the Alpaca format")
    size = extra.get("input", 0)
    question, extended = (question[: -size - 2], question[-size:]) if size else (question, "")
    out: Json = {**restore_fields(row, "alpaca"), "instruction": question, "input": extended, "output": answer}
    return out | ({"system": system} if system else {}) | ({"history": history} if history else {})
