"""Read prompt-only rows: {"prompt": text or messages}, as TRL's prompt-only format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.core.types import messages_from_json, messages_to_json
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import raise_rejected, read_raw_rows
from llmworks.data.store.rows import Row


def read_prompt_rows(data: Dataset) -> list[Row]:
    """Return chat rows without an answer. The row's number, from 1, replaces a missing `id`.

    Errors: DataError for a row without a prompt, or one that cannot be read.
    """
    rejected = RejectedRows()
    rows: list[Row] = []
    for file, number, row in read_raw_rows(data.path, rejected):
        where = f"{data.name}: {file} row {number}"
        prompt = row.get("prompt")
        if not isinstance(prompt, (str, list)) or not prompt:
            raise DataError(
                f"{where}: has no `prompt` (text or messages); give prompt-only rows, or conversations of the stage"
                " data.chat"
            )
        rows.append(
            {
                "id": str(row.get("id", number)),
                "group": str(row.get("group") or row.get("id", number)),
                "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _check(prompt, where),
                "tools": row.get("tools") or [],
                "answer": row.get("answer"),
                "extra": {},
            }
        )
    raise_rejected(data.name, rejected)
    return rows


def _check(messages: Sequence[Any], where: str) -> list[Any]:
    try:
        return messages_to_json(messages_from_json(messages))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: `prompt` is not a list of messages ({error})") from None
