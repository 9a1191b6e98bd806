"""Stage `data.chat`: raw rows become conversations, with the functions in the system turn and the accepted answer beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmworks.artifact import Config, Dataset
from llmworks.context import Context
from llmworks.data.bfcl import chat_row
from llmworks.data.jsonl import Rejected, read_jsonl
from llmworks.data.rows import Row, write_chat
from llmworks.errors import DataError
from llmworks.tokenize.templates import flatten_tools
from llmworks.types import Json, Message, messages_from_json, messages_to_json


class ChatConfig(Config):
    """What the raw rows are."""

    format: Literal["bfcl", "messages"] = Field(
        "messages",
        description="bfcl: questions.jsonl with answers.jsonl; messages: JSONL rows with OpenAI-style `messages`, optional `tools`, `id`, `group`, `answer`",
    )


def chat(config: ChatConfig, data: Dataset, ctx: Context) -> Dataset:
    """Convert raw rows to conversations. Rows that cannot be converted are kept in `rejected.jsonl` with their reason.

    Errors: DataError for a missing or empty file, or when no row is left.
    """
    rejected = Rejected()
    rows = bfcl_rows(data.path, rejected) if config.format == "bfcl" else message_rows(data.path, rejected)
    if not rows:
        first = f": {rejected.rows[0]['file']} line {rejected.rows[0]['line']}: {rejected.rows[0]['reason']}" if rejected.rows else ""
        raise DataError(f"{data.path}: no row could be read as {config.format!r}{first}")
    write_chat(ctx.out, rows)
    rejected.write(ctx.out, ctx.progress.say)
    return Dataset(
        ctx.out,
        metrics={"rows": len(rows), "rejected": len(rejected.rows)},
        about={"schema": "chat", "rows": len(rows), "rejected": len(rejected.rows)},
    )


def bfcl_rows(folder: Path, rejected: Rejected) -> list[Row]:
    """Chat rows of a BFCL category: a system turn listing the functions, the question, the right call."""
    if not folder.is_dir():
        raise DataError(f"{folder}: format bfcl takes a directory with questions.jsonl and answers.jsonl")
    answers = {answer.get("id"): answer for _, answer in read_jsonl(folder / "answers.jsonl", rejected)}
    rows: list[Row] = []
    seen: set[str] = set()
    for line, question in read_jsonl(folder / "questions.jsonl", rejected):
        try:
            messages, functions, call, accepted = chat_row(question, answers[question.get("id")])
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
            rejected.add("questions.jsonl", line, f"not a BFCL question with an answer ({type(error).__name__}: {error})", str(question))
            continue
        full = flatten_tools((*messages, Message("assistant", "", (call,))), functions)
        if question["id"] in seen:
            rejected.add("questions.jsonl", line, f"the id {question['id']!r} stands twice", str(question))
            continue
        seen.add(question["id"])
        rows.append({"id": question["id"], "group": call.name, "messages": messages_to_json(full), "tools": functions, "answer": accepted})
    return rows


def message_rows(path: Path, rejected: Rejected) -> list[Row]:
    """Chat rows of JSONL files with `messages`; tools stand beside them, as given."""
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise DataError(f"{path}: has no .jsonl file")
    rows: list[Row] = []
    seen: set[str] = set()
    for file in files:
        for line, raw in read_jsonl(file, rejected):
            try:
                row = message_row(raw, f"{file.stem}-{line}")
                if row["id"] in seen:
                    raise ValueError(f"the id {row['id']!r} stands twice")
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                rejected.add(file.name, line, str(error) or type(error).__name__, str(raw))
                continue
            seen.add(row["id"])
            rows.append(row)
    return rows


def message_row(raw: Json, default_id: str) -> Row:
    """One row with `messages` as a chat row. ValueError, AttributeError, KeyError or TypeError when it is none."""
    if not isinstance(raw.get("messages"), list) or not raw["messages"]:
        raise ValueError("has no list `messages`")
    messages = messages_from_json(raw["messages"])
    if not any(m.role == "assistant" for m in messages):
        raise ValueError("has no assistant turn")
    tools = raw.get("tools") or []
    tools = [tool.get("function", tool) for tool in (json.loads(tools) if isinstance(tools, str) else tools)]
    identity = str(raw.get("id") or default_id)
    row = {
        "id": identity, "group": str(raw.get("group") or identity), "messages": messages_to_json(flatten_tools(messages, tools)), "tools": tools,
        "answer": raw.get("answer"),
    }  # fmt: skip
    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no text
    return row
