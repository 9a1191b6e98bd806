"""Rows of a Dataset artifact: written as Parquet with a fixed schema, read back as dictionaries.

A chat row is {id, group, messages, tools, answer, extra}; a preference row has prompt, chosen and rejected instead of
messages. tools, answer and extra are stored as JSON strings, since their structure differs between rows; extra holds
the row's other fields, and that of a turn the turn's, such as reasoning_content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.core.types import MESSAGE_KEYS, Json, Message, get_extra_fields, messages_from_json
from llmworks.tokenize.chat.templates import flatten_tools

Row = dict[str, Any]
GROUP_ROWS = 4096  # rows of one row group, the smallest unit of parallel processing
TURNS = {"chat": ("messages",), "preference": ("prompt", "chosen", "rejected")}
KIND_NAMES = {"chat": "conversations", "preference": "preference pairs"}


def _schema(kind: str) -> Any:
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
            ("weight", pa.int8()),
            ("extra", pa.string()),
        ]
    )
    turns = [(name, pa.list_(message)) for name in TURNS[kind]]
    return pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            *turns,
            ("tools", pa.string()),
            ("answer", pa.string()),
            ("extra", pa.string()),
        ]
    )


def _pack_turn(turn: Json) -> Json:
    """Move the fields of a turn that have no column into `extra`, as JSON."""
    extra = get_extra_fields(turn)
    return {**{key: turn[key] for key in MESSAGE_KEYS & turn.keys()}, "extra": extra or None}


def _unpack_turn(turn: Json) -> Json:
    extra = turn.get("extra")
    return {**(json.loads(extra) if extra else {}), **{k: v for k, v in turn.items() if v is not None and k != "extra"}}


def write_chat(out: Path, rows: Sequence[Row]) -> None:
    """Write chat rows to `part-00000.parquet`."""
    _write(out, rows, "chat")


def write_preference(out: Path, rows: Sequence[Row]) -> None:
    """Write preference rows to `part-00000.parquet`."""
    _write(out, rows, "preference")


def _write(out: Path, rows: Sequence[Row], kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = json.JSONEncoder(ensure_ascii=False).encode
    stored = [
        {
            **row,
            **{name: [_pack_turn(turn) for turn in row[name]] for name in TURNS[kind]},
            "tools": text(row["tools"]) if row.get("tools") else "[]",
            "answer": text(row.get("answer")),
            "extra": text(row["extra"]) if row.get("extra") else "{}",
        }
        for row in rows
    ]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(stored, schema=_schema(kind)),
        out / "part-00000.parquet",
        compression="zstd",
        row_group_size=GROUP_ROWS,
    )


def read_chat(dataset: Dataset) -> list[Row]:
    """Read all chat rows of a dataset. DataError when it has another schema or cannot be read."""
    return _read(dataset, "chat")


def read_preference(dataset: Dataset) -> list[Row]:
    """Read all preference rows of a dataset. DataError when it has another schema or cannot be read."""
    return _read(dataset, "preference")


def flatten_messages(row: Row) -> tuple[Message, ...]:
    """Return a chat row's messages with tools in the system turn and calls as text, for templates without tools."""
    return flatten_tools(messages_from_json(row["messages"]), row.get("tools") or ())


def has_parquet(dataset: Dataset) -> bool:
    """Return whether a dataset has Parquet files, as those that stages make do."""
    return dataset.path.is_dir() and any(dataset.path.glob("*.parquet"))


def detect_schema(dataset: Dataset) -> str:
    """Detect the schema of a dataset from its columns: "chat", "preference", or "" for anything else."""
    names = _column_names(dataset)
    return next((kind for kind, turns in TURNS.items() if set(turns) <= names), "")


def detect_full_schema(dataset: Dataset) -> str:
    """Detect the schema as `detect_schema`, but require every column of the schema, not only the turns."""
    names = _column_names(dataset)
    return next((kind for kind in TURNS if set(_schema(kind).names) <= names), "")


def _column_names(dataset: Dataset) -> set[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    try:
        return set(pq.read_schema(files[0]).names) if files else set()
    except (pa.ArrowInvalid, OSError):
        return set()  # reported when the rows are read


def list_row_files(dataset: Dataset, kind: str) -> list[Path]:
    """List the Parquet files of a dataset of "chat" or "preference" rows. DataError when there are none."""
    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(
            f"{dataset.path}: has no Parquet files of {KIND_NAMES[kind]}; create them with the stage data.chat"
        )
    return files


def open_rows(file: Path, kind: str) -> Any:
    """Open a `ParquetFile` of "chat" or "preference" rows. DataError when it is something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    names = opened.schema_arrow.names
    missing = [name for name in _schema(kind).names if name not in names and name != "extra"]
    if missing:
        opened.close()
        raise DataError(
            f"{file}: has no column {missing[0]!r}, so it holds no {KIND_NAMES[kind]}; create them with the stage"
            " data.chat"
        )
    return opened


def read_row_tables(file: Path, kind: str, first: int = 0, last: int | None = None) -> Iterator[Any]:
    """Read a file's row groups from `first` to `last` (exclusive) as tables, one at a time."""
    import pyarrow as pa

    with open_rows(file, kind) as opened:
        for group in range(first, opened.num_row_groups if last is None else last):
            try:
                yield opened.read_row_group(group)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]})") from None


def iter_table_rows(table: Any, kind: str) -> Iterator[Row]:
    """Convert a table to rows. DataError for a row without turns in a required column."""
    for row in table.to_pylist():
        if any(row[name] is None or None in row[name] for name in TURNS[kind]):
            raise DataError(
                f"row {row['id']!r}: {' or '.join(TURNS[kind])} is empty; create {KIND_NAMES[kind]} with the stage"
                " data.chat"
            )
        try:
            turns = {name: [_unpack_turn(turn) for turn in row[name]] for name in TURNS[kind]}
            loaded = {
                "tools": json.loads(row["tools"] or "[]"),
                "answer": json.loads(row["answer"] or "null"),
                "extra": json.loads(row.get("extra") or "{}"),
            }
        except ValueError as error:
            raise DataError(
                f"row {row['id']!r}: tools, answer or extra is not JSON ({error}); create {KIND_NAMES[kind]} with the"
                " stage data.chat"
            ) from None
        yield {**row, **turns, **loaded}


def _read(dataset: Dataset, kind: str) -> list[Row]:
    rows = [
        row
        for file in list_row_files(dataset, kind)
        for table in read_row_tables(file, kind)
        for row in iter_table_rows(table, kind)
    ]
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(f"{dataset.path}: duplicate id {twice!r}; ids must be unique")
    return rows
