"""Formats of conversation and preference datasets: detected by their keys, read into one schema and written back.

Each format is one module with `matches(raw)`, `read(raw)` and `write(row)`. Fields outside the schema are kept in
`extra`, so that a row can be written back unchanged. Reading and writing raise ValueError, which says what is wrong.
"""

from __future__ import annotations

import json
from types import ModuleType

from llmworks.core.types import Json
from llmworks.data.chat_formats import alpaca, chatml, completion, evals, messages, preference, sharegpt
from llmworks.data.chat_formats.fields import Row

# in detection order
FORMATS: dict[str, ModuleType] = {
    "preference": preference,
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "chatml": chatml,
    "evals": evals,
    "completion": completion,
}
CONTENT = ("messages", "prompt", "chosen", "rejected", "tools", "answer")


def detect_format(raw: Json) -> str:
    """Detect the format of a raw row. ValueError when it has no known format."""
    for name, shape in FORMATS.items():
        if shape.matches(raw):
            return name
    empty = next((key for key in messages.KEYS if key in raw and not raw[key]), "")
    if empty:
        raise ValueError(f"has no turns: `{empty}` is empty")
    if "prompt" in raw:
        raise ValueError(
            "has a `prompt` but no completion; prompt-only rows must be `messages` with a user turn, read with"
            " turns: any"
        )
    keys = ", ".join(list(raw)[:8]) or "none"
    raise ValueError(f"has no known format (keys: {keys}); known: {', '.join(FORMATS)}")


def read(raw: Json, name: str = "") -> Row:
    """Convert a raw row to the chat or preference schema.

    A row that its format would not write back unchanged is also kept in `extra["raw"]`.
    """
    shape = FORMATS[name or detect_format(raw)]
    if not shape.matches(raw):
        raise ValueError(f"is not in the format {name!r}; its keys are {', '.join(list(raw)[:8]) or 'none'}")
    row: Row = shape.read(raw)
    json.dumps(row, ensure_ascii=False).encode()  # raises for a lone surrogate, which is not valid text
    try:
        same = shape.write(row) == raw
    except ValueError:
        same = False
    if not same:
        row["extra"]["raw"] = raw
    return row


def write(row: Row, name: str = "") -> Json:
    """Convert a row to a format; without a name, to the format it was read from (unchanged unless it was edited).

    ValueError for a row that the format cannot hold without loss.
    """
    extra = row.get("extra") or {}
    origin = "" if name else extra.get("shape", "")
    if name:
        row = {**row, "extra": {key: extra[key] for key in ("fields", "input") if key in extra}}
    name = name or origin or ("preference" if "chosen" in row else "messages")
    if (name == "preference") != ("chosen" in row):
        raise ValueError(f"a {'preference pair' if 'chosen' in row else 'conversation'} cannot be written as {name!r}")
    raw: Json | None = extra.get("raw") if origin == name else None
    if raw is not None:
        before = FORMATS[name].read(raw)
        if all(before.get(key) == row.get(key) for key in CONTENT):
            return raw
    made: Json = FORMATS[name].write(row)
    return made
