"""Documents on disk: Parquet shards written and read as a stream, and the side file of what could not be used.

Memory is bounded by a row group, not by the data. A shard's bytes depend on its documents alone. Knows no file format
but Parquet.
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

GROUP_BYTES = 8 << 20  # text of one row group
SHARD_BYTES = 256 << 20  # text of one shard
COLUMNS = ("id", "text", "source", "metadata")
REJECTED = "rejected.jsonl"
COPY_OF = "copy_of"  # metadata of a document that stands more than once: the id of the first


@dataclass(frozen=True)
class Unusable:
    """Something that gave no document: where it stood (`line` is 0 for a whole file), why, and how it began."""

    file: str
    line: int
    reason: str
    text: str = ""


class DocumentWriter:
    """Writes `part-00000.parquet` and on, a row group at a time; the directory is made with the first document.

    `reasons`: a fifth column `reason` says why a document is here, as where dropped ones are kept.
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
        with (
            contextlib.nullcontext() if kind is None else contextlib.suppress(OSError)
        ):  # the first error is the one to tell
            try:
                if kind is None:
                    self._flush()
            finally:
                self._close()

    def add(self, document: Document, reason: str = "") -> None:
        """Write one document, sooner or later."""
        metadata = json.dumps(document.metadata, ensure_ascii=False, sort_keys=True) if document.metadata else "{}"
        row = (document.id, document.text, document.source, metadata)
        self._rows.append((*row, reason) if len(self.columns) > len(row) else row)
        self.documents += 1
        self.characters += len(document.text)
        self._grown(len(document.text.encode()))

    def add_table(self, table: Any) -> None:
        """Write the documents of a table that has this writer's columns."""
        import pyarrow.compute as pc

        self._rows_to_table()
        table = table.select(list(self.columns))
        self._tables.append(table)
        self.documents += table.num_rows
        self.characters += pc.sum(pc.utf8_length(table["text"])).as_py() or 0
        self._grown(pc.sum(pc.binary_length(table["text"])).as_py() or 0)

    def _grown(self, size: int) -> None:
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
            # a stream of our own: one that Arrow opens is closed twice when the disk is full, which may hit another
            # file
            self._stream = (self.out / f"part-{self.shards:05d}.parquet").open("wb")
            self._file = pq.ParquetWriter(self._stream, self._schema(), compression="zstd")
            self.shards += 1
        self._file.write_table(table, row_group_size=table.num_rows)
        self._in_shard += self._pending
        self._tables, self._pending = [], 0
        if self._in_shard >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        """End the shard that is being written, if there is one."""
        file, stream = self._file, self._stream
        self._file, self._stream, self._in_shard = None, None, 0
        if file is not None:
            try:
                file.close()
            finally:
                file.is_open = False  # else it is tried again when it is collected
                stream.close()


class SideFile:
    """`rejected.jsonl`: what could not be used, written as it comes, and counted by reason."""

    def __init__(self, out: Path) -> None:
        self.path = out / REJECTED
        self.reasons: Counter[str] = Counter()
        self.first: Unusable | None = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, item: Unusable) -> None:
        """Write one down. A reason's part in brackets is detail, and not counted apart."""
        if self._stream is None:
            self._stream = self.path.open("w", encoding="utf-8", errors="backslashreplace")
            self.first = item
        row = {"file": item.file, "line": item.line, "reason": item.reason, "text": item.text[:2000]}
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.reasons[item.reason.partition(" (")[0]] += 1

    @property
    def count(self) -> int:
        """How many were written."""
        return sum(self.reasons.values())


def shard_files(dataset: Dataset) -> list[Path]:
    """The Parquet files of a data set of documents. DataError when there are none."""
    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(f"{dataset.path}: has no Parquet files of documents; make them with the stage data.read")
    return files


def open_shard(file: Path) -> Any:
    """An open `ParquetFile` of documents. DataError when it is something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _give_back()
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
            else f"column {other[0]!r} is no text ({schema.field(other[0]).type})"
        )
        raise DataError(f"{file}: {what}, so it holds no documents; make them with the stage data.read")
    return opened


@functools.cache
def _give_back() -> None:
    """Let Arrow return freed memory at once where it can; by default it keeps a quarter more than it needs."""
    import pyarrow as pa

    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())
        pa.jemalloc_set_decay_ms(0)


def read_tables(
    file: Path, first: int = 0, last: int | None = None, columns: tuple[str, ...] = COLUMNS
) -> Iterator[Any]:
    """A shard's row groups from `first` up to `last` as tables, one at a time."""
    import pyarrow as pa

    with open_shard(file) as opened:
        for group in range(first, opened.num_row_groups if last is None else last):
            try:
                table = opened.read_row_group(group, columns=list(columns))
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]})") from None
            empty = next((name for name in table.column_names if table[name].null_count), None)
            if empty is not None:
                raise DataError(f"{file}: column {empty!r} has empty values; make documents with the stage data.read")
            yield table


def table_documents(table: Any) -> Iterator[Document]:
    """A table's documents."""
    for batch in table.to_batches(max_chunksize=1024):
        columns = [batch.column(name).to_pylist() for name in COLUMNS]
        for id, text, source, metadata in zip(*columns, strict=True):
            try:
                yield Document(id, text, source, json.loads(metadata) if metadata != "{}" else {})
            except ValueError:
                raise DataError(
                    f"document {id!r}: its metadata is no JSON object ({metadata[:40]!r}); make documents with the"
                    " stage data.read"
                ) from None


def read_documents(dataset: Dataset) -> Iterator[Document]:
    """All documents of a data set, one after the other. DataError when it is of another schema or cannot be read."""
    for file in shard_files(dataset):
        for table in read_tables(file):
            yield from table_documents(table)


def count_characters(dataset: Dataset) -> tuple[int, int]:
    """(documents, characters of their texts) of a data set, without making documents of it."""
    import pyarrow.compute as pc

    documents = characters = 0
    for file in shard_files(dataset):
        for table in read_tables(file, columns=("text",)):
            documents += table.num_rows
            characters += pc.sum(pc.utf8_length(table["text"])).as_py() or 0
    return documents, characters
