r"""Preference formats: `chosen` and `rejected`, with an explicit prompt, an implicit one, or a conversation.

Supported: prompt and two strings; prompt and two lists of turns; two lists of turns with a common prefix (the implicit
prompt); Anthropic's "\n\nHuman: ... \n\nAssistant: ..." strings; LLaMA-Factory's `conversations` with a chosen and a
rejected turn.
"""

from __future__ import annotations

import re
from typing import Any

from llmworks.core.types import Json, Message, messages_from_json, messages_to_json
from llmworks.data.chat_formats import sharegpt
from llmworks.data.chat_formats.fields import (
    Row,
    check_representable,
    convert_common,
    parse_prompt,
    parse_turns,
    restore_fields,
)

PROMPTS = ("prompt", "question", "instruction", "query")
HUMAN = "\n\nHuman:"
TURN = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\nHuman:|\n\nAssistant:|\Z)", re.DOTALL)


def matches(raw: Json) -> bool:
    """Return whether a row has `chosen` and `rejected`."""
    return "chosen" in raw and "rejected" in raw


def read(raw: Json) -> Row:
    """Convert to a preference row {prompt, chosen, rejected}, each a list of messages.

    ValueError when the prompt cannot be determined.
    """
    key = next((name for name in PROMPTS if name in raw), "")
    if key:
        form, prompt, chosen, rejected, variant = "prompt", *_read_with_prompt(raw, key)
    elif sharegpt.matches(raw):
        form = "conversations"
        prompt = [sharegpt.to_message(turn, i) for i, turn in enumerate(raw["conversations"], 1)]
        chosen, rejected = ([sharegpt.to_message(raw[name])] for name in ("chosen", "rejected"))
        variant = {}
    elif isinstance(raw["chosen"], list) and isinstance(raw["rejected"], list):
        form, variant = "turns", {}
        prompt, chosen, rejected = _split_prompt(
            parse_turns(raw, "chosen", "assistant")[0], parse_turns(raw, "rejected", "assistant")[0]
        )
    elif isinstance(raw["chosen"], str) and raw["chosen"].startswith(HUMAN):
        form, variant = "human", {}
        prompt, chosen, rejected = _split_prompt(_parse_human(raw, "chosen"), _parse_human(raw, "rejected"))
    else:
        raise ValueError(f"has chosen and rejected, but no prompt ({', '.join(PROMPTS)})")
    used = variant.pop("used", ())
    row = convert_common(
        raw,
        "preference",
        (key, "chosen", "rejected", "conversations", *used) if key else ("chosen", "rejected", "conversations"),
        {"form": form, "key": key, **variant},
    )
    return {
        **row,
        "prompt": messages_to_json(prompt),
        "chosen": messages_to_json(chosen),
        "rejected": messages_to_json(rejected),
    }


def _read_with_prompt(raw: Json, key: str) -> tuple[list[Message], list[Message], list[Message], Json]:
    prompt, form, used = parse_prompt(raw, key)
    chosen, first = parse_turns(raw, "chosen", "assistant")
    rejected, second = parse_turns(raw, "rejected", "assistant")
    whole = [first > 0 and chosen[: len(prompt)] == prompt, second > 0 and rejected[: len(prompt)] == prompt]
    if whole[0]:  # UltraFeedback repeats the prompt in both sides
        chosen = chosen[len(prompt) :]
    if whole[1]:
        rejected = rejected[len(prompt) :]
    if not chosen or not rejected:
        raise ValueError("chosen or rejected contains only the prompt")
    return prompt, chosen, rejected, {"forms": [form, first, second], "whole": whole, "used": used}


def _split_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split off the implicit prompt: the longest common prefix of turns that ends before an assistant turn."""
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    while size and (size >= min(len(chosen), len(rejected)) or chosen[size - 1].role == "assistant"):
        size -= 1
    if not size:
        raise ValueError("chosen and rejected have no common first turns, so there is no implicit prompt")
    return chosen[:size], chosen[size:], rejected[size:]


def _parse_human(raw: Json, key: str) -> list[Message]:
    value: Any = raw[key]
    if not isinstance(value, str) or not value.startswith(HUMAN):
        raise ValueError(f"`{key}` must begin with '\\n\\nHuman:' as the other side does")
    return [
        Message("user" if turn[1] == "Human" else "assistant", turn[2].removeprefix(" "))
        for turn in TURN.finditer(value)
    ]


def write(row: Row) -> Json:
    """Convert to the raw row in its original form; other rows get prompt and both sides as lists of turns."""
    prompt, chosen, rejected = (list(messages_from_json(row[name])) for name in ("prompt", "chosen", "rejected"))
    extra = row.get("extra") or {}
    out = restore_fields(row, "preference")
    form = extra.get("form")
    if form == "conversations":
        turns = [sharegpt.from_message(m) for m in (*prompt, *chosen, *rejected)]
        return {**out, "conversations": turns[:-2], "chosen": turns[-2], "rejected": turns[-1]}
    if form == "human":
        check_representable([*prompt, *chosen, *rejected], "the Human/Assistant format")
        return {**out, "chosen": _format_human([*prompt, *chosen]), "rejected": _format_human([*prompt, *rejected])}
    if form == "turns":
        return {
            **out,
            "chosen": messages_to_json([*prompt, *chosen]),
            "rejected": messages_to_json([*prompt, *rejected]),
        }
    forms, whole = extra.get("forms", [0, 0, 0]), extra.get("whole", [False, False])
    sides = [prompt, [*prompt, *chosen] if whole[0] else chosen, [*prompt, *rejected] if whole[1] else rejected]
    check_representable(
        [m for turns, kind in zip(sides, forms, strict=True) if kind < 0 for m in turns], "a pair of strings"
    )
    values = [
        turns[0].content if kind < 0 else messages_to_json(turns) for turns, kind in zip(sides, forms, strict=True)
    ]
    return {**out, **dict(zip((extra.get("key") or "prompt", "chosen", "rejected"), values, strict=True))}


def _format_human(messages: list[Message]) -> str:
    return "".join(f"\n\n{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in messages)
