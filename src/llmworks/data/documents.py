"""Documents on disk: Parquet shards written and read as a stream, and the side file of what could not be used.

Memory is bounded by a row group, not by the data. A shard's bytes depend on its documents alone. Knows no file format but Parquet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmworks.artifact import Dataset
from llmworks.errors import DataError
from llmworks.types import Document

GROUP_BYTES = 8 << 20  # text of one row group
SHARD_BYTES = 256 << 20  # text of one shard
COLUMNS = ("id", "text", "source", "metadata")


@dataclass(frozen=True)
class Unusable:
    """Something that gave no document: where it stood (`line` is 0 for a whole file), why, and how it began."""

    file: str
    line: int
    reason: str
    text: str = ""


class DocumentWriter:
    """Writes `part-00000.parquet` and on, a row group at a time."""

    def __init__(self, out: Path, *, group_bytes: int = GROUP_BYTES, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self.group_bytes, self.shard_bytes = out, group_bytes, shard_bytes
        self.documents = self.characters = self.shards = 0
        self._rows: list[Document] = []
        self._pending = self._in_shard = 0
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        if self._file is not None:
            self._file.close()

    def add(self, document: Document) -> None:
        """Write one document, sooner or later."""
        self._rows.append(document)
        self._pending += len(document.text.encode())
        self.documents += 1
        self.characters += len(document.text)
        if self._pending >= self.group_bytes:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        schema = pa.schema([(name, pa.string()) for name in COLUMNS])
        if self._file is None:
            self._file = pq.ParquetWriter(self.out / f"part-{self.shards:05d}.parquet", schema, compression="zstd")
            self.shards += 1
        columns = [
            [d.id for d in self._rows],
            [d.text for d in self._rows],
            [d.source for d in self._rows],
            [json.dumps(d.metadata, ensure_ascii=False, sort_keys=True) for d in self._rows],
        ]
        self._file.write_table(pa.table(columns, schema=schema))
        self._in_shard += self._pending
        self._rows, self._pending = [], 0
        if self._in_shard >= self.shard_bytes:
            self._file.close()
            self._file, self._in_shard = None, 0


class SideFile:
    """`rejected.jsonl`: what could not be used, written as it comes, and counted by reason."""

    def __init__(self, out: Path) -> None:
        self.path = out / "rejected.jsonl"
        self.reasons: Counter[str] = Counter()
        self.first: Unusable | None = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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


def read_documents(dataset: Dataset) -> Iterator[Document]:
    """All documents of a data set, one after the other. DataError when it is of another schema or cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(dataset.path.glob("*.parquet")) if dataset.path.is_dir() else []
    if not files:
        raise DataError(f"{dataset.path}: has no Parquet files of documents; make them with the stage data.read")
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                missing = [name for name in COLUMNS if name not in opened.schema_arrow.names]
                if missing:
                    raise DataError(f"{file}: has no column {missing[0]!r}, so it holds no documents; make them with the stage data.read")
                for batch in opened.iter_batches(batch_size=1024, columns=list(COLUMNS)):
                    for row in batch.to_pylist():
                        yield Document(row["id"], row["text"], row["source"], json.loads(row["metadata"]))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
