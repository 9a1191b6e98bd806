"""Read training rows (conversations, documents, or rows of `prompt` and `completion`) and tokenize them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.core.types import MESSAGE_KEYS, messages_from_json
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import raise_rejected, read_raw_rows
from llmworks.data.store.rows import Row, detect_schema, has_parquet, read_chat
from llmworks.tokenize.chat.templates import adapt_tools, encode_text, find_unread_fields, render_answers


def read_training_rows(data: Dataset) -> list[Row]:
    """Read rows with an id and `messages`, or `text`, or `prompt` and `completion`.

    Errors: DataError for anything else, or rows that cannot be read.
    """
    parquet = has_parquet(data)
    if detect_schema(data) == "chat":
        return read_chat(data)
    if parquet and _has_documents(data):
        return [{"id": document.id, "text": document.text} for document in read_documents(data)]
    if parquet and not data.about.get("schema"):
        return read_chat(data)  # raises an error that says what is wrong
    rejected, rows = RejectedRows(), []
    for file, number, row in read_raw_rows(data.path, rejected):
        where = f"{data.name}: {file} row {number}"
        names = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
        if "messages" in row or "conversations" in row:
            raise DataError(f"{where}: holds a conversation; convert these rows with the stage data.chat first")
        wrong = next((name for name in names if not isinstance(row.get(name), str)), None)
        if wrong:
            raise DataError(
                f"{where}: has no text field {wrong!r}; fine-tuning reads conversations (data.chat), documents, or rows"
                " of `text`, or of `prompt` and `completion`"
            )
        rows.append({"id": str(row.get("id", number)), **{name: row[name] for name in names}})
    raise_rejected(data.name, rejected)
    if not rows:
        raise DataError(f"{data.name}: has no rows")
    return rows


def _has_documents(data: Dataset) -> bool:
    """Return whether the Parquet files hold documents."""
    import pyarrow.parquet as pq

    file = min(data.path.glob("*.parquet"))
    try:
        return {"id", "text"} <= set(pq.read_schema(file).names)
    except (OSError, ValueError):
        return False


def warn_unread_fields(tokenizer: Any, rows: Sequence[Row], log: Callable[[str], None], *, samples: int = 16) -> None:
    """Log fields of turns, such as reasoning_content, that the template does not read in some rows that have them."""
    having: dict[str, int] = {}
    unread: set[str] = set()
    for row in rows:
        turns = [turn for name in ("messages", "prompt", "chosen", "rejected") for turn in row.get(name, ())]
        names = {key for turn in turns for key in turn if key not in MESSAGE_KEYS}
        if not names:
            continue
        if any(having.get(name, 0) < samples for name in names):
            messages = messages_from_json(row.get("messages") or [*row["prompt"], *row["chosen"]])
            with suppress(RequestError, ModelError):  # such rows are dropped with the reason
                unread |= set(find_unread_fields(tokenizer, messages, row.get("tools") or ()))
        for name in names:
            having[name] = having.get(name, 0) + 1
    for name in sorted(unread):
        log(f"warning: the chat template does not read the field {name!r} of turns in {having[name]:,} rows")


def tokenize_row(tokenizer: Any, row: Row) -> tuple[Sequence[int], Sequence[int]]:
    """Tokenize a row into (token ids, loss mask: 1 = trained on); of several parts the last (`tokenize_answers`).

    Errors: RequestError, ModelError or ValueError for a row that the chat template rejects.
    """
    return tokenize_answers(tokenizer, row)[-1]


def tokenize_answers(tokenizer: Any, row: Row) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Tokenize a row into (token ids, loss mask); where the template rewrites earlier turns, one for each answer.

    Errors: as `tokenize_row`; ValueError for a conversation without an answer to train on.
    """
    if "messages" not in row:
        return [_tokenize_text(tokenizer, row)]
    messages, tools = adapt_tools(tokenizer, messages_from_json(row["messages"]), row.get("tools") or ())
    found: list[tuple[Sequence[int], Sequence[int]]] = [
        (one.ids, one.mask) for one in render_answers(tokenizer, messages, tools=tools)
    ]
    if not found:
        raise ValueError("no assistant tokens to train on")
    return found


def _tokenize_text(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Tokenize plain text with a final EOS token: the loss mask covers all of it, or the completion of a prompt."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    bos = tokenizer.bos_token_id
    begin = (
        [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []
    )  # only for tokenizers that add BOS
    prompt = list(encode_text(tokenizer, row["prompt"])) if "prompt" in row else []
    completion = list(encode_text(tokenizer, row["completion"] if "prompt" in row else row["text"])) + end
    return begin + prompt + completion, [0] * (len(begin) + len(prompt)) + [1] * len(completion)
