"""Read documents from tables, one per row: JSONL, JSON, CSV, Parquet, Arrow (as saved by Hugging Face `datasets`).

One field is the text, the others become metadata. A row without text is rejected with its row number.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from llmworks.core.documents import RejectedInput
from llmworks.core.types import Document
from llmworks.data.readers.csv_rows import RejectedCsvRow, iter_csv_rows
from llmworks.data.readers.input_files import InputFile, open_seekable
from llmworks.data.readers.text import NotTextError, read_limited, size_limit_reason

WRAPPERS = ("data", "rows", "examples", "train", "instances")  # keys of an object that holds the rows


@dataclass(frozen=True)
class TableFields:
    """Field mapping: the text field, the id field ("" = use the row number), the text size limit in bytes, and the
    metadata fields to keep (None = all).
    """

    text: str
    id: str
    max_bytes: int
    keep: frozenset[str] | None = None


def row_to_document(row: Mapping[str, Any], source: str, number: int, fields: TableFields) -> Document | RejectedInput:
    """Convert a row to a document, or to the reason it is rejected. `number` counts from 1."""
    text = row.get(fields.text)
    if fields.text not in row:
        return RejectedInput(
            source, number, f"no field {fields.text!r} (it has {', '.join(map(str, row))})", _preview(row)
        )
    if not isinstance(text, str):
        return RejectedInput(
            source, number, f"field {fields.text!r} is not a string ({type(text).__name__})", _preview(row)
        )
    if not text.strip():
        return RejectedInput(source, number, "empty", _preview(row))
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return RejectedInput(source, number, "a lone surrogate, which is not valid text", ascii(text[:2000]))
    if size > fields.max_bytes:
        return RejectedInput(source, number, size_limit_reason(fields.max_bytes), text[:2000])
    id_value = row.get(fields.id) if fields.id else None
    if fields.id and id_value is None:
        return RejectedInput(source, number, f"no field {fields.id!r} for the id", _preview(row))
    keep = row.keys() - {fields.text, fields.id} if fields.keep is None else fields.keep
    metadata = {str(k): to_json_value(v) for k, v in row.items() if k in keep and v is not None}
    return Document(str(id_value) if fields.id else f"{source}#{number}", text, source, metadata)


def _preview(row: Mapping[str, Any]) -> str:
    return json.dumps({str(k): to_json_value(v) for k, v in row.items()}, ensure_ascii=False)[:2000]


def to_json_value(value: Any) -> Any:
    """Convert a value of a row to plain JSON."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, Mapping):
        return {str(k): to_json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(v) for v in value]
    if isinstance(value, (datetime.date, datetime.time, datetime.datetime)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value) if isinstance(value, decimal.Decimal) else repr(value)


def iter_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line), with None for a line of more than `limit` bytes, which is skipped without buffering it."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line


def read_jsonl_rows(source: InputFile, fields: TableFields) -> Iterator[Document | RejectedInput]:
    """Read one document per line."""
    with source.open() as stream:
        for number, line in iter_lines(stream, fields.max_bytes * 2):  # JSON escapes can double the size
            if line is None:
                yield RejectedInput(source.name, number, size_limit_reason(fields.max_bytes))
            elif line.strip():
                yield _json_row(line, source.name, number, fields)


def _json_row(line: bytes, name: str, number: int, fields: TableFields) -> Document | RejectedInput:
    try:
        row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RejectedInput(name, number, f"not UTF-8 (byte {error.start})", line.decode("utf-8", "replace")[:2000])
    except (ValueError, RecursionError) as error:
        return RejectedInput(name, number, f"not JSON ({error})", line.decode("utf-8", "replace")[:2000])
    if not isinstance(row, dict):
        return RejectedInput(name, number, "not a JSON object", line.decode("utf-8", "replace")[:2000])
    return row_to_document(row, name, number, fields)


def read_json(source: InputFile, fields: TableFields) -> Iterator[Document | RejectedInput]:
    """Read one document per object from a file that is an object or a list of objects. The whole file is loaded."""
    if is_json_lines(source, fields.max_bytes):
        yield from read_jsonl_rows(source, fields)
        return
    with source.open() as stream:
        data = read_limited(stream, fields.max_bytes)
    if data is None:
        yield RejectedInput(
            source.name, 0, size_limit_reason(fields.max_bytes) + "; convert it to JSONL, which is read line by line"
        )
        return
    try:
        rows = parse_json_rows(data)
    except (ValueError, RecursionError) as error:
        yield RejectedInput(source.name, 0, f"not JSON ({error})")
        return
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield row_to_document(row, source.name, number, fields)
        else:
            yield RejectedInput(source.name, number, "not a JSON object", str(row)[:2000])


def parse_json(text: str) -> Any:
    """Parse JSON. ValueError also for NaN and Infinity, which Python's parser accepts and other readers refuse."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_json_rows(data: bytes) -> list[Any]:
    """Return the rows of a whole .json file: a list, an object with one list of objects (`data`), or one object.

    Errors: ValueError for anything else.
    """
    value = parse_json(data.decode("utf-8-sig"))
    if isinstance(value, dict):
        lists = [key for key in WRAPPERS if isinstance(value.get(key), list)]
        if lists and all(isinstance(row, dict) and "role" not in row and "from" not in row for row in value[lists[0]]):
            return list(value[lists[0]])
    return value if isinstance(value, list) else [value]


def is_json_lines(source: InputFile, max_bytes: int) -> bool:
    """Return whether a file holds JSON lines, whatever its suffix: its first line is an object, and others follow."""
    with source.open() as stream:
        lines = (line for _, line in iter_lines(stream, max_bytes) if line is None or line.strip())
        first, second = next(lines, None), next(lines, None)
    try:
        return first is not None and second is not None and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def read_csv(source: InputFile, fields: TableFields) -> Iterator[Document | RejectedInput]:
    """Read one document per row; the first row is the header."""
    try:
        for number, row in iter_csv_rows(source, fields.max_bytes):
            if isinstance(row, RejectedCsvRow):
                yield RejectedInput(source.name, number, row.reason, row.text)
            elif fields.text not in row:
                yield RejectedInput(source.name, 1, f"no field {fields.text!r} (it has {', '.join(row)[:200]})")
                return
            else:
                yield row_to_document(row, source.name, number, fields)
    except NotTextError as error:
        yield RejectedInput(source.name, 0, str(error))


def read_parquet(source: InputFile, fields: TableFields) -> Iterator[Document | RejectedInput]:
    """Read one document per row, in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_seekable(source) as stream:
        try:
            with pq.ParquetFile(stream) as table:
                yield from _arrow_rows(
                    (b for b in table.iter_batches(batch_size=256)), table.schema_arrow.names, source.name, fields
                )
        except (pa.ArrowException, OSError) as error:
            yield RejectedInput(source.name, 0, f"not readable as Parquet ({str(error).splitlines()[0]})")


def read_arrow(source: InputFile, fields: TableFields) -> Iterator[Document | RejectedInput]:
    """Read one document per row of an Arrow stream or file."""
    import pyarrow as pa

    with open_seekable(source) as stream:
        try:
            try:
                table: Any = pa.ipc.open_stream(stream)
                batches: Iterable[Any] = table
            except pa.ArrowInvalid:
                stream.seek(0)
                table = pa.ipc.open_file(stream)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            yield from _arrow_rows(batches, table.schema.names, source.name, fields)
        except (pa.ArrowException, OSError) as error:
            yield RejectedInput(source.name, 0, f"not readable as Arrow ({str(error).splitlines()[0]})")


def _arrow_rows(
    batches: Iterable[Any], names: list[str], source: str, fields: TableFields
) -> Iterator[Document | RejectedInput]:
    if fields.text not in names:
        yield RejectedInput(source, 0, f"no field {fields.text!r} (it has {', '.join(names)})")
        return
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield row_to_document(row, source, number, fields)
