"""Stream rows of raw files as JSON objects: JSONL, JSON, Parquet, Arrow, CSV; compressed or not, file or directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmworks.core.documents import RejectedInput
from llmworks.core.errors import DataError
from llmworks.core.types import Json
from llmworks.data.readers.csv_rows import RejectedCsvRow, iter_csv_rows
from llmworks.data.readers.input_files import BROKEN, expand_archives, find_files, make_input_file, open_seekable
from llmworks.data.readers.tables import is_json_lines, iter_lines, parse_json_rows, to_json_value
from llmworks.data.store.jsonl import RejectedRows

LIMIT = 64 << 20  # maximum bytes of one row
EXPANDED = 1 << 36
KNOWN = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")


def read_raw_rows(path: Path, rejected: RejectedRows) -> Iterator[tuple[str, int, Json]]:
    """Yield (file, row number from 1, row).

    Rows that are not objects are rejected. DataError for an unsupported file type, or when there are no files.
    """
    count = 0
    for file in find_files(path):
        if file.name in ("README.md", "rejected.jsonl", "dataset_info.json", "state.json", "LICENSE"):
            continue
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty")
        for item in expand_archives(make_input_file(path, file), EXPANDED):
            if isinstance(item, RejectedInput):
                rejected.add(item.file, item.line, item.reason, item.text)
                continue
            if item.suffix not in KNOWN:
                raise DataError(
                    f"{item.name}: unsupported file type; supported are {', '.join(KNOWN)}, compressed or not"
                )
            count += 1
            for number, row in _read_rows(item, rejected):
                if isinstance(row, dict):
                    yield item.name, number, row
                else:
                    rejected.add(item.name, number, "not a JSON object", row)
    if not count:
        raise DataError(f"{path}: has no conversation files ({', '.join(KNOWN)})")


def _read_rows(item: Any, rejected: RejectedRows) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    try:
        if item.suffix in (".jsonl", ".ndjson") or (item.suffix == ".json" and is_json_lines(item, LIMIT)):
            with item.open() as stream:
                yield from _json_lines(stream, item.name, rejected)
        elif item.suffix == ".json":
            with item.open() as stream:
                yield from enumerate(parse_json_rows(stream.read()), 1)
        elif item.suffix in (".csv", ".tsv"):
            for number, row in iter_csv_rows(item, LIMIT):
                if isinstance(row, RejectedCsvRow):
                    rejected.add(item.name, number, row.reason, row.text)
                else:
                    yield number, row
        else:
            with open_seekable(item) as stream:
                yield from enumerate(
                    (drop_nulls(row) for batch in _batches(stream, item.suffix) for row in batch.to_pylist()), 1
                )
    except (ValueError, pa.ArrowException, *BROKEN) as error:
        raise DataError(
            f"{item.name}: cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def _json_lines(stream: IO[bytes], name: str, rejected: RejectedRows) -> Iterator[tuple[int, Any]]:
    for number, line in iter_lines(stream, LIMIT):
        if line is None:
            rejected.add(name, number, f"longer than {LIMIT >> 20} MB", "")
        elif line.strip():
            try:
                yield (
                    number,
                    json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")),
                )  # some editors write a byte order mark
            except UnicodeDecodeError as error:
                rejected.add(name, number, f"not UTF-8 (byte {error.start})", line.decode("utf-8", "replace"))
            except (ValueError, RecursionError) as error:
                rejected.add(name, number, f"not JSON ({error})", line.decode("utf-8"))


def _batches(stream: IO[bytes], suffix: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix == ".parquet":
        with pq.ParquetFile(stream) as table:
            yield from table.iter_batches(batch_size=256)
        return
    try:
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        opened = pa.ipc.open_file(stream)
        yield from (opened.get_batch(i) for i in range(opened.num_record_batches))


def raise_rejected(name: str, rejected: RejectedRows) -> None:
    """Raise DataError for rows that could not be read, with the first one's place."""
    if rejected.rows:
        first = rejected.rows[0]
        raise DataError(
            f"{name}: {len(rejected.rows)} rows cannot be read, the first in {first['file']}:{first['line']}:"
            f" {first['reason']}"
        )


def drop_nulls(value: Any) -> Any:
    """Convert a table row to plain JSON without nulls: a table fills fields that a row does not have with null."""
    if isinstance(value, dict):
        return {k: drop_nulls(v) for k, v in value.items() if v is not None}
    return [drop_nulls(v) for v in value] if isinstance(value, list) else to_json_value(value)
