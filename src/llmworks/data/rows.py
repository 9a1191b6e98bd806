"""Rows of a Dataset artifact: written as Parquet with a fixed schema, read back as plain dictionaries.

A chat row is {id, group, messages, tools, answer, extra}; a preference row has prompt, chosen and rejected instead of messages. tools,
answer and extra are kept as JSON text, since every row has its own shape; extra is what the row had besides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.artifact import Dataset
from llmworks.errors import DataError
from llmworks.tokenize.templates import flatten_tools
from llmworks.types import Message, messages_from_json

Row = dict[str, Any]
TURNS = {"chat": ("messages",), "preference": ("prompt", "chosen", "rejected")}


def _schema(kind: str) -> Any:
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call)), ("tool_call_id", pa.string()), ("name", pa.string()), ("weight", pa.int8())]
    )
    turns = [(name, pa.list_(message)) for name in TURNS[kind]]
    return pa.schema([("id", pa.string()), ("group", pa.string()), *turns, ("tools", pa.string()), ("answer", pa.string()), ("extra", pa.string())])


def write_chat(out: Path, rows: Sequence[Row]) -> None:
    """Write chat rows to `part-00000.parquet`."""
    _write(out, rows, "chat")


def write_preference(out: Path, rows: Sequence[Row]) -> None:
    """Write preference rows to `part-00000.parquet`."""
    _write(out, rows, "preference")


def _write(out: Path, rows: Sequence[Row], kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    stored = [{**row, "tools": text(row.get("tools") or []), "answer": text(row.get("answer")), "extra": text(row.get("extra") or {})} for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(stored, schema=_schema(kind)), out / "part-00000.parquet", compression="zstd")


def read_chat(dataset: Dataset) -> list[Row]:
    """All chat rows of a dataset. DataError when it is of another schema or cannot be read."""
    return _read(dataset, "chat", "conversations")


def read_preference(dataset: Dataset) -> list[Row]:
    """All preference rows of a dataset. DataError when it is of another schema or cannot be read."""
    return _read(dataset, "preference", "preference pairs")


def flat_messages(row: Row) -> tuple[Message, ...]:
    """A chat row's conversation with its tools in the system turn and its calls as text, for whom knows no tools."""
    return flatten_tools(messages_from_json(row["messages"]), row.get("tools") or ())


def schema_of(dataset: Dataset) -> str:
    """ "chat" or "preference", by what the files hold; "" for anything else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    try:
        names = pq.read_schema(files[0]).names if files else []
    except (pa.ArrowInvalid, OSError):
        return ""  # told when it is read
    return next((kind for kind, turns in TURNS.items() if set(turns) <= set(names)), "")


def _read(dataset: Dataset, kind: str, what: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(f"{dataset.path}: has no Parquet files of {what}; make them with the stage data.chat")
    wanted = [name for name in _schema(kind).names if name != "extra"]
    rows: list[Row] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
        missing = [name for name in wanted if name not in table.column_names]
        if missing:
            raise DataError(f"{file}: has no column {missing[0]!r}, so it holds no {what}; make them with the stage data.chat")
        for row in table.to_pylist():
            turns = {name: [{k: v for k, v in turn.items() if v is not None} for turn in row[name]] for name in TURNS[kind]}
            loaded = {"tools": json.loads(row["tools"] or "[]"), "answer": json.loads(row["answer"] or "null"), "extra": json.loads(row.get("extra") or "{}")}
            rows.append({**row, **turns, **loaded})
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(f"{dataset.path}: the id {twice!r} stands twice; answers could not be told apart")
    return rows
