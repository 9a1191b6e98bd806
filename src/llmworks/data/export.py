"""Stage `data.export`: export conversations or preference pairs as JSONL, in each row's original format or in one
format.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import messages_from_json, messages_to_json
from llmworks.data import chat_formats as shapes
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.rows import Row, detect_schema, read_chat, read_preference

FILE = "data.jsonl"


class ExportConfig(Config):
    """Output format."""

    format: Literal["as-read", "messages", "sharegpt", "alpaca", "chatml", "completion", "preference"] = Field(
        "as-read",
        description=(
            "as-read: every row in its original format, except for the order of keys; else all rows in this format,"
            " with the same keys"
        ),
    )
    extra_turn_fields: Literal["drop_rows", "drop_fields"] = Field(
        "drop_rows",
        description="fields of turns that not every format can hold, such as reasoning_content; drop_rows: reject the"
        " row; drop_fields: drop the fields",
    )


def drop_extra_fields(row: Row) -> None:
    """Remove the fields of turns that the schema has no column for."""
    row["extra"].pop("raw", None)
    for name in ("messages", "prompt", "chosen", "rejected"):
        if name in row:
            row[name] = messages_to_json([replace(m, extra="") for m in messages_from_json(row[name])])


def export(config: ExportConfig, data: Dataset, ctx: Context) -> Dataset:
    """Write `data.jsonl`; rows that the format cannot represent go to rejected.jsonl with the reason.

    Errors: DataError when no row is left.
    """
    rows = read_preference(data) if detect_schema(data) == "preference" else read_chat(data)
    rejected = RejectedRows()
    count = 0
    with (ctx.out / FILE).open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows, 1):
            if config.extra_turn_fields == "drop_fields":
                drop_extra_fields(row)
            try:
                raw = shapes.write(row, "" if config.format == "as-read" else config.format)
            except ValueError as error:
                rejected.add(data.name, number, str(error), row)
                continue
            stream.write(json.dumps(raw, ensure_ascii=False) + "\n")
            count += 1
    if not count:
        raise DataError(
            f"{data.name}: no row can be written as {config.format!r}; the first reason: {rejected.rows[0]['reason']}"
        )
    rejected.write(ctx.out, ctx.progress.log)
    return Dataset(
        ctx.out,
        metrics={"rows": count, "rejected": len(rejected.rows)},
        about={"schema": "raw", "format": config.format, "rows": count},
    )
