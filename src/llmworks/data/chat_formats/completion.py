"""Prompt-completion format: two strings or two lists of turns, under one of the usual pairs of field names."""

from __future__ import annotations

from llmworks.core.types import Json, messages_from_json, messages_to_json
from llmworks.data.chat_formats.fields import (
    Row,
    check_representable,
    convert_common,
    parse_prompt,
    parse_turns,
    restore_fields,
)

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("instruction", "response"),  # Dolly
)


def matches(raw: Json) -> bool:
    """Return whether a row has one of the field pairs."""
    return any(a in raw and b in raw for a, b in PAIRS)


def read(raw: Json) -> Row:
    """Convert to a chat row. ValueError for fields that are neither strings nor lists of turns."""
    first, second = next((a, b) for a, b in PAIRS if a in raw and b in raw)
    before, prompt_form, used = parse_prompt(raw, first)
    completion, answer_form = parse_turns(raw, second, "assistant")
    variant: Json = {"pair": [first, second], "forms": [prompt_form, answer_form]}
    row = convert_common({k: v for k, v in raw.items() if k not in (first, second, *used)}, "completion", (), variant)
    return {**row, "messages": messages_to_json([*before, *completion])}


def write(row: Row) -> Json:
    """Convert to the raw row: strings for one user and one assistant turn, lists of turns for anything else."""
    messages = list(messages_from_json(row["messages"]))
    extra = row.get("extra") or {}
    if extra.get("shape") == "completion":
        (first, second), (prompted, answered) = extra["pair"], extra["forms"]
        turns = 1 if prompted < 0 else prompted
    else:
        first, second, turns = "prompt", "completion", len(messages) - 1
        prompted = answered = (
            -1 if [m.role for m in messages] == ["user", "assistant"] and not messages[1].tool_calls else 0
        )
        if not messages or messages[-1].role != "assistant":
            raise ValueError("does not end with an assistant turn, so there is no completion")
    prompt, completion = messages[:turns], messages[turns:]
    check_representable(
        [*(prompt if prompted < 0 else []), *(completion if answered < 0 else [])], "a completion as text"
    )
    return {
        **restore_fields(row, "completion"),
        first: prompt[0].content if prompted < 0 else messages_to_json(prompt),
        second: completion[0].content if answered < 0 else messages_to_json(completion),
    }
