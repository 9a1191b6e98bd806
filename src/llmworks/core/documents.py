"""Documents on disk: Parquet shards written and read as a stream, and the side file of unusable input.

Memory is bounded by a row group. A shard's bytes depend on its documents alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.core.types import Document

GROUP_BYTES = 8 << 20  # text bytes of one row group
SHARD_BYTES = 256 << 20  # text bytes of one shard
COLUMNS = ("id", "text", "source", "metadata")
REJECTED = "rejected.jsonl"
COPY_OF = "copy_of"  # metadata key of a duplicate: the id of the first document


@dataclass(frozen=True)
class RejectedInput:
    """Input that gave no document: its place (`line` is 0 for a whole file), the reason, and its first characters."""

    file: str
    line: int
    reason: str
    text: str = ""


class DocumentWriter:
    """Writes `part-00000.parquet` and so on by row groups; the directory is created with the first document.

    `reasons`: add a column `reason`, for dropped documents.
    """

    def __init__(
        self, out: Path, *, reasons: bool = False, group_bytes: int = GROUP_BYTES, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.out, self.group_bytes, self.shard_bytes = out, group_bytes, shard_bytes
        self.columns = (*COLUMNS, "reason") if reasons else COLUMNS
        self.documents = self.characters = self.shards = 0
        self._rows: list[tuple[str, ...]] = []
        self._tables: list[Any] = []
        self._pending = self._in_shard = 0
        self._file: Any = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):  # report the first error
            try:
                if kind is None:
                    self._flush()
            finally:
                self._close()

    def add(self, document: Document, reason: str = "") -> None:
        """Add one document; it is written with its row group."""
        metadata = json.dumps(document.metadata, ensure_ascii=False, sort_keys=True) if document.metadata else "{}"
        row = (document.id, document.text, document.source, metadata)
        self._rows.append((*row, reason) if len(self.columns) > len(row) else row)
        self.documents += 1
        self.characters += len(document.text)
        self._add_pending(len(document.text.encode()))

    def add_table(self, table: Any) -> None:
        """Add the documents of a table that has this writer's columns."""
        import pyarrow.compute as pc

        self._rows_to_table()
        table = table.select(list(self.columns))
        self._tables.append(table)
        self.documents += table.num_rows
        self.characters += pc.sum(pc.utf8_length(table["text"])).as_py() or 0
        self._add_pending(pc.sum(pc.binary_length(table["text"])).as_py() or 0)

    def _add_pending(self, size: int) -> None:
        self._pending += size
        if self._pending >= self.group_bytes:
            self._flush()

    def _rows_to_table(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._tables.append(pa.table(list(map(list, zip(*self._rows, strict=True))), schema=self._schema()))
            self._rows = []

    def _schema(self) -> Any:
        import pyarrow as pa

        return pa.schema([(name, pa.string()) for name in self.columns])

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._rows_to_table()
        table = pa.concat_tables(self._tables) if self._tables else None
        if table is None or not table.num_rows:
            return
        if self._file is None:
            self.out.mkdir(parents=True, exist_ok=True)
            # our own stream: one opened by Arrow is closed twice when the disk is full, which may close another
            # file's descriptor
            self._stream = (self.out / f"part-{self.shards:05d}.parquet").open("wb")
            self._file = pq.ParquetWriter(self._stream, self._schema(), compression="zstd")
            self.shards += 1
        self._file.write_table(table, row_group_size=table.num_rows)
        self._in_shard += self._pending
        self._tables, self._pending = [], 0
        if self._in_shard >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        """Close the current shard, if there is one."""
        file, stream = self._file, self._stream
        self._file, self._stream, self._in_shard = None, None, 0
        if file is not None:
            try:
                file.close()
            finally:
                file.is_open = False  # else closing is retried when it is garbage-collected
                stream.close()


class RejectedFile:
    """`rejected.jsonl`: unusable input, written as it occurs and counted by reason."""

    def __init__(self, out: Path) -> None:
        self.path = out / REJECTED
        self.reasons: Counter[str] = Counter()
        self.first: RejectedInput | None = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, item: RejectedInput) -> None:
        """Write one item. Details of a reason in parentheses are not counted separately."""
        if self._stream is None:
            self._stream = self.path.open("w", encoding="utf-8", errors="backslashreplace")
            self.first = item
        row = {"file": item.file, "line": item.line, "reason": item.reason, "text": item.text[:2000]}
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.reasons[item.reason.partition(" (")[0]] += 1

    @property
    def count(self) -> int:
        """Number of items written."""
        return sum(self.reasons.values())


def list_shards(dataset: Dataset) -> list[Path]:
    """Return the Parquet files of a document data set. DataError when there are none."""
    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(f"{dataset.path}: no Parquet files of documents; create them with the stage data.read")
    return files


def open_shard(file: Path) -> Any:
    """Open a `ParquetFile` of documents. DataError when it is something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _enable_memory_release()
    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    schema = opened.schema_arrow
    missing = [name for name in COLUMNS if name not in schema.names]
    other = [
        name
        for name in COLUMNS
        if name not in missing
        and not (pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type))
    ]
    if missing or other:
        opened.close()
        what = (
            f"has no column {missing[0]!r}"
            if missing
            else f"column {other[0]!r} is not text ({schema.field(other[0]).type})"
        )
        raise DataError(f"{file}: {what}, so it does not contain documents; create them with the stage data.read")
    return opened


@functools.cache
def _enable_memory_release() -> None:
    """Let Arrow return freed memory immediately where it can; by default it keeps a quarter more than it needs."""
    import pyarrow as pa

    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())
        pa.jemalloc_set_decay_ms(0)


def read_tables(
    file: Path, first: int = 0, last: int | None = None, columns: tuple[str, ...] = COLUMNS
) -> Iterator[Any]:
    """Yield a shard's row groups from `first` up to `last` as tables."""
    import pyarrow as pa

    with open_shard(file) as opened:
        for group in range(first, opened.num_row_groups if last is None else last):
            try:
                table = opened.read_row_group(group, columns=list(columns))
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]})") from None
            empty = next((name for name in table.column_names if table[name].null_count), None)
            if empty is not None:
                raise DataError(f"{file}: column {empty!r} has null values; create documents with the stage data.read")
            yield table


def iterate_documents(table: Any) -> Iterator[Document]:
    """Yield a table's documents."""
    for batch in table.to_batches(max_chunksize=1024):
        columns = [batch.column(name).to_pylist() for name in COLUMNS]
        for id, text, source, metadata in zip(*columns, strict=True):
            try:
                yield Document(id, text, source, json.loads(metadata) if metadata != "{}" else {})
            except ValueError:
                raise DataError(
                    f"document {id!r}: its metadata is not a JSON object ({metadata[:40]!r}); create documents"
                    " with the stage data.read"
                ) from None


def read_documents(dataset: Dataset) -> Iterator[Document]:
    """Yield all documents of a data set. DataError when it has another schema or cannot be read."""
    for file in list_shards(dataset):
        for table in read_tables(file):
            yield from iterate_documents(table)


def count_characters(dataset: Dataset) -> tuple[int, int]:
    """Return (documents, characters of their texts) of a data set without creating documents."""
    import pyarrow.compute as pc

    documents = characters = 0
    for file in list_shards(dataset):
        for table in read_tables(file, columns=("text",)):
            documents += table.num_rows
            characters += pc.sum(pc.utf8_length(table["text"])).as_py() or 0
    return documents, characters
