"""Stage `data.chat`: convert raw rows of the usual chat formats to conversations or preference pairs of one schema.

The format of each row is detected from its keys. Rows with faulty turns are rejected with the reason, never repaired
silently. The stage `data.export` converts back.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count as count_from
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import MESSAGE_KEYS, Json, Message, messages_from_json, messages_to_json
from llmworks.data import chat_formats as shapes
from llmworks.data.card import finish_rows
from llmworks.data.conversations.turns import find_problems, merge_consecutive_turns
from llmworks.data.published import bfcl, flan_cot, spider
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import read_raw_rows
from llmworks.data.store.rows import KIND_NAMES, TURNS, Row, detect_full_schema
from llmworks.data.text.statistics import get_question
from llmworks.tokenize.chat.tool_schemas import drop_padding

BRACKETS = re.compile(r" ?\([^()]*\)")
STEM = re.compile(r"(\.(?:jsonl|ndjson|json|parquet|arrow|csv|tsv))?(\.(?:gz|bz2|xz|zst|zip|tar|tgz))*$")
PUBLISHED = {"bfcl": bfcl, "flan-cot": flan_cot, "spider": spider}


class ChatConfig(Config):
    """Format of the raw rows, and which rows are accepted."""

    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "chatml",
        "completion",
        "evals",
        "preference",
        "bfcl",
        "flan-cot",
        "spider",
    ] = Field(
        "auto",
        description=(
            "auto: detect each row's format from its keys; bfcl, flan-cot and spider: published datasets in formats of"
            " their own"
        ),
    )
    turns: Literal["strict", "any"] = Field(
        "strict",
        description=("strict: reject rows with turns out of order, empty turns or broken tool calls; any: keep them"),
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="drop: reject rows whose turns and tools equal those of an earlier row"
    )
    merge_turns: bool = Field(False, description="first join consecutive turns of one role, with an empty line between")


def chat(config: ChatConfig, data: Dataset, ctx: Context) -> Dataset:
    """Convert raw rows; unusable rows are written to `rejected.jsonl` with the reason.

    Errors: DataError for a missing or empty file, or when no row is left.
    """
    if kind := detect_full_schema(data):
        raise DataError(
            f"{data.path}: already holds {KIND_NAMES[kind]} in this schema; use data.export to write another format,"
            " data.mix"
            " to combine datasets"
        )
    rejected = RejectedRows()
    published = PUBLISHED.get(config.format)
    log = ctx.progress.log
    rows = published.rows(data.path, rejected) if published else list(_convert_rows(config, data, rejected, log))
    if config.duplicates == "drop":
        rows = drop_duplicate_rows(rows, data.name, rejected)
    if not rows:
        first = (
            f": {rejected.rows[0]['file']} line {rejected.rows[0]['line']}: {rejected.rows[0]['reason']}"
            if rejected.rows
            else ""
        )
        raise DataError(
            f"{data.path}: no row could be read as"
            f" {'a conversation' if config.format == 'auto' else repr(config.format)}{first}"
        )
    pairs = "chosen" in rows[0]
    rejected.write(ctx.out, ctx.progress.log)
    found = Counter(row["extra"].get("shape", config.format) for row in rows)
    reasons = Counter(row["reason"] for row in rejected.rows)
    ctx.report.title = f"{data.name} as {'preference pairs' if pairs else 'conversations'}"
    ctx.report.subtitle = f"{len(rows):,} rows, {len(rejected.rows):,} rejected."
    ctx.report.data = {"rows": len(rows), "shapes": dict(found), "rejected": dict(reasons)}
    ctx.report.add_table("Formats", ("format", "rows"), found.most_common())
    if reasons:
        ctx.report.add_table(
            "Rejected", ("reason", "rows"), reasons.most_common(40), note="The rows are in rejected.jsonl."
        )
    if turn_fields := count_turn_fields(rows):
        ctx.report.data["turn_fields"] = turn_fields
        ctx.report.add_table(
            "Further fields of turns", ("field", "rows"), list(turn_fields.items()), "Kept. A template may read them."
        )
        named = ", ".join(f"{name} ({number:,} rows)" for name, number in turn_fields.items())
        log(f"turns have further fields: {named}; they are kept, for templates that read them")
    extra = {"rejected": len(rejected.rows), "shapes": dict(found)}
    return finish_rows(
        ctx,
        "data.chat",
        [data],
        rows,
        dropped=generalize_reasons(reasons),
        metrics={"rejected": len(rejected.rows)},
        extra=extra,
    )


def drop_duplicate_rows(rows: Sequence[Row], name: str, rejected: RejectedRows) -> list[Row]:
    """Reject rows whose turns and tools equal those of an earlier row; return the others."""
    first: dict[str, str] = {}
    unique_rows = []
    for number, row in enumerate(rows, 1):
        content = _get_content(row)
        if first.setdefault(content, row["id"]) == row["id"]:
            unique_rows.append(row)
        else:
            rejected.add(name, number, f"duplicate of another row ({first[content]})", row)
    return unique_rows


def count_turn_fields(rows: Sequence[Row]) -> dict[str, int]:
    """Count the rows whose turns have fields beside those of the schema, such as reasoning_content."""
    found: Counter[str] = Counter()
    for row in rows:
        turns = [turn for name in ("messages", "prompt", "chosen", "rejected") for turn in row.get(name, ())]
        found.update({key for turn in turns for key in turn if key not in MESSAGE_KEYS})
    return dict(found.most_common())


def _get_content(row: Row) -> str:
    return json.dumps([row.get(side) for side in ("messages", "prompt", "chosen", "rejected", "tools")], sort_keys=True)


def generalize_reasons(reasons: Mapping[str, int]) -> dict[str, int]:
    """Strip row-specific details from reasons (turn numbers, names, parentheses, advice) and add up their counts."""
    found: Counter[str] = Counter()
    for reason, count in reasons.items():
        plain = BRACKETS.sub("", BRACKETS.sub("", re.sub(r"'[^']*'", "...", reason))).partition(";")[0]
        found[
            re.sub(r"(?:turns?|message) \d+(?: and \d+)?", lambda m: "turns" if " and " in m[0] else "a turn", plain)
        ] += count
    return dict(found)


def _convert_rows(
    config: ChatConfig, data: Dataset, rejected: RejectedRows, log: Callable[[str], None]
) -> Iterator[Row]:
    seen: dict[str, str] = {}  # id -> content
    renamed = 0
    questions: dict[str, str] = {}  # question -> id of the first row with it, used as the group
    pairs: bool | None = None
    for file, number, raw in read_raw_rows(data.path, rejected):
        try:
            row = convert_row(config, raw, f"{get_stem(file)}-{number}")
            content = _get_content(row)
            if seen.get(row["id"]) == content:
                raise ValueError(f"duplicate id {row['id']!r}")
            if pairs is not None and pairs != ("chosen" in row):
                raise ValueError(
                    "a preference pair among conversations"
                    if "chosen" in row
                    else "a conversation among preference pairs"
                )
        except (ValueError, AttributeError, KeyError, TypeError, UnicodeEncodeError) as error:
            rejected.add(file, number, get_rejection_reason(error), raw)
            continue
        pairs = "chosen" in row
        if row["id"] in seen:  # ids of topics or users are no keys
            renamed += 1
            row["id"] = next(id for n in count_from(2) if (id := f"{row['id']}~{n}") not in seen)
        seen[row["id"]] = content
        if not row["group"]:
            row["group"] = questions.setdefault(get_question(row), row["id"])
        yield row
    if renamed:
        log(f"{renamed:,} rows have the id of an earlier, different row; a number was added to it")


def get_stem(file: str) -> str:
    """Return a file's path without the suffixes of its type and compression, so that rows of all files have ids."""
    return STEM.sub("", file)


def get_rejection_reason(error: Exception) -> str:
    """Return an error's message as a rejection reason; Python's own errors include their type."""
    if isinstance(error, UnicodeEncodeError):
        return "a lone surrogate, which is not valid Unicode text"
    return (
        str(error)
        if type(error) is ValueError
        else f"does not match the format that its keys indicate ({type(error).__name__}: {error})"
    )


def convert_row(config: ChatConfig, raw: Json, default_id: str) -> Row:
    """Convert one raw row to the schema; its group may be empty.

    Errors: ValueError, AttributeError, KeyError or TypeError when the format does not fit or the turns are faulty.
    """
    row = shapes.read(raw, "" if config.format == "auto" else config.format)
    row["id"] = row["id"] or default_id
    _drop_padded_arguments(row)
    if config.merge_turns:
        for name in TURNS["preference" if "chosen" in row else "chat"]:
            row[name] = messages_to_json(merge_consecutive_turns(messages_from_json(row[name])))
    if config.turns == "strict":
        for messages in get_conversations(row):
            if found := find_problems(messages, row["tools"]):
                raise ValueError(found[0])
    return row


def _drop_padded_arguments(row: Row) -> None:
    """Remove null arguments that only another function has."""
    functions = {function["name"]: function for function in row["tools"]}
    for name in TURNS["preference" if "chosen" in row else "chat"]:
        if any(turn.get("tool_calls") for turn in row[name]):
            row[name] = messages_to_json(
                [
                    replace(
                        message,
                        tool_calls=tuple(
                            replace(call, arguments=drop_padding(call.arguments, functions.get(call.name)))
                            for call in message.tool_calls
                        ),
                    )
                    for message in messages_from_json(row[name])
                ]
            )


def get_conversations(row: Row) -> list[tuple[Message, ...]]:
    """Return the full conversations of a row: its own, or the prompt with the chosen and with the rejected side."""
    if "chosen" not in row:
        return [messages_from_json(row["messages"])]
    return [messages_from_json([*row["prompt"], *row[side]]) for side in ("chosen", "rejected")]
