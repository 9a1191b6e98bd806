"""The shapes in which conversations and preferences are exchanged, recognised by their keys, read into one schema and
written back.

Each shape is one file: `matches(raw)`, `read(raw)` and `write(row)`. What the schema has no place for is kept in
`extra`, so that a row is
written back as it was. Reading and writing raise ValueError, which says what is wrong.
"""

from __future__ import annotations

import json
from types import ModuleType

from llmworks.core.types import Json
from llmworks.data.chat_formats import alpaca, chatml, completion, evals, messages, preference, sharegpt
from llmworks.data.chat_formats.fields import Row

# in the order in which they are tried
SHAPES: dict[str, ModuleType] = {
    "preference": preference,
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "chatml": chatml,
    "evals": evals,
    "completion": completion,
}
CONTENT = ("messages", "prompt", "chosen", "rejected", "tools", "answer")


def recognise(raw: Json) -> str:
    """The name of a row's shape. ValueError when it has none."""
    for name, shape in SHAPES.items():
        if shape.matches(raw):
            return name
    empty = next((key for key in messages.KEYS if key in raw and not raw[key]), "")
    if empty:
        raise ValueError(f"has no turns: `{empty}` is empty")
    if "prompt" in raw:
        raise ValueError(
            "has a `prompt` and nothing that answers it; questions alone are rows of `messages` with a user turn, read"
            " with turns: any"
        )
    keys = ", ".join(list(raw)[:8]) or "none"
    raise ValueError(f"its keys ({keys}) are of no known shape; known: {', '.join(SHAPES)}")


def read(raw: Json, name: str = "") -> Row:
    """A raw row in the schema of conversations, or of preferences.

    One that its shape would not write back as it is carries itself along.
    """
    shape = SHAPES[name or recognise(raw)]
    if not shape.matches(raw):
        raise ValueError(f"is not of the shape {name!r}; its keys are {', '.join(list(raw)[:8]) or 'none'}")
    row: Row = shape.read(raw)
    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no text
    try:
        same = shape.write(row) == raw
    except ValueError:
        same = False
    if not same:
        row["extra"]["raw"] = raw
    return row


def write(row: Row, name: str = "") -> Json:
    """The row in a shape, with that shape's own keys; without a name in the one it came in, as it was unless it was
    changed since.

    ValueError for a row of which something would be lost.
    """
    extra = row.get("extra") or {}
    origin = "" if name else extra.get("shape", "")
    if name and extra.get("lost"):
        raise ValueError(
            f"its turns have {', '.join(map(repr, extra['lost']))}, which would be lost; format: as-read keeps them,"
            " turn_fields: drop leaves them out"
        )
    if name:
        row = {**row, "extra": {key: extra[key] for key in ("fields", "input") if key in extra}}
    name = name or origin or ("preference" if "chosen" in row else "messages")
    if (name == "preference") != ("chosen" in row):
        raise ValueError(f"a {'preference pair' if 'chosen' in row else 'conversation'} cannot be written as {name!r}")
    raw: Json | None = extra.get("raw") if origin == name else None
    if raw is not None:
        before = SHAPES[name].read(raw)
        if all(before.get(key) == row.get(key) for key in CONTENT):
            return raw
    made: Json = SHAPES[name].write(row)
    return made
