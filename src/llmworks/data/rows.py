"""Rows of a Dataset artifact: written as Parquet with a fixed schema, read back as plain dictionaries.

A chat row is {id, group, messages, tools, answer}; tools and answer are kept as JSON text, since every row has its own shape.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.artifact import Dataset
from llmworks.errors import DataError

Row = dict[str, Any]


def _chat_schema() -> Any:
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call)), ("tool_call_id", pa.string())])
    return pa.schema(
        [("id", pa.string()), ("group", pa.string()), ("messages", pa.list_(message)), ("tools", pa.string()), ("answer", pa.string())]
    )


def write_chat(out: Path, rows: Sequence[Row]) -> None:
    """Write chat rows to `part-00000.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = [
        {
            **row,
            "tools": json.dumps(row.get("tools") or [], ensure_ascii=False),
            "answer": json.dumps(row.get("answer"), ensure_ascii=False),
        }
        for row in rows
    ]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(stored, schema=_chat_schema()), out / "part-00000.parquet", compression="zstd")


def read_chat(dataset: Dataset) -> list[Row]:
    """All chat rows of a dataset. DataError when it is of another schema or cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(f"{dataset.path}: has no Parquet files of conversations; make them with the stage data.chat")
    rows: list[Row] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
        missing = [name for name in _chat_schema().names if name not in table.column_names]
        if missing:
            raise DataError(f"{file}: has no column {missing[0]!r}, so it holds no conversations; make them with the stage data.chat")
        for row in table.to_pylist():
            messages = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
            rows.append(
                {**row, "messages": messages, "tools": json.loads(row["tools"] or "[]"), "answer": json.loads(row["answer"] or "null")}
            )
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"{dataset.path}: the id {twice!r} stands twice; answers could not be told apart")
    return rows
