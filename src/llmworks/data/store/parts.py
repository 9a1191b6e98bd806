"""Parallel, resumable processing in parts: planned from the input alone, each processed once, combined in order.

A part writes into its own scratch folder and writes a summary last, so an interrupted run resumes with the missing
parts. The bytes of the result do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.documents import COLUMNS, iterate_documents, list_shards, open_shard, read_tables
from llmworks.core.types import Document, Json

PART_BYTES = 8 << 20
SUMMARY = "summary.json"
Part = TypeVar("Part")
Work = Callable[[Part, Path], Json]


@dataclass(frozen=True)
class Span:
    """Row groups `first` to `last` (exclusive) of one shard; `row` is the dataset index of their first document."""

    file: Path
    first: int
    last: int
    row: int
    rows: int

    def tables(self, columns: tuple[str, ...] = COLUMNS) -> Iterator[Any]:
        """Read the row groups as tables."""
        return read_tables(self.file, self.first, self.last, columns)

    def documents(self) -> Iterator[Document]:
        """Read the documents."""
        for table in self.tables():
            yield from iterate_documents(table)


def plan_spans(dataset: Dataset, part_bytes: int = PART_BYTES) -> list[Span]:
    """Split a dataset of documents into parts of about `part_bytes`. DataError when it holds no documents."""
    return plan_file_spans(list_shards(dataset), open_shard, part_bytes)


def plan_file_spans(
    files: Sequence[Path], open_file: Callable[[Path], Any], part_bytes: int = PART_BYTES
) -> list[Span]:
    """Split Parquet files into parts of about `part_bytes`."""
    found: list[Span] = []
    row = 0
    for file in files:
        with open_file(file) as opened:
            groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
        first = size = rows = 0
        for index, group in enumerate(groups, 1):
            size += group.total_byte_size
            rows += group.num_rows
            if size >= part_bytes or index == len(groups):
                found.append(Span(file, first, index, row, rows))
                row, first, size, rows = row + rows, index, 0, 0
    return found


@dataclass(frozen=True)
class PartResults:
    """Outputs of all parts: folders and summaries, in part order."""

    folders: list[Path]
    summaries: list[Json]

    def sum_counters(self, key: str) -> Counter[str]:
        """Sum the counters under `key` of all summaries."""
        counts: Counter[str] = Counter()
        for summary in self.summaries:
            counts.update(summary.get(key, {}))
        return counts

    def sum_values(self, key: str) -> int:
        """Sum the numbers under `key` of all summaries."""
        return sum(summary.get(key, 0) for summary in self.summaries)

    def gather(self, out: Path) -> None:
        """Combine the parts' outputs in `out`: shards (also in subfolders) are renumbered, JSONL files concatenated.

        Files are hard-linked, not moved: an interrupted run still finds its parts complete.
        """
        numbers: Counter[str] = Counter()
        for folder in self.folders:
            for file in sorted(folder.rglob("*")):
                if file.suffix == ".jsonl":
                    with file.open("rb") as part, (out / file.name).open("ab") as whole:
                        shutil.copyfileobj(part, whole)
                elif file.suffix == ".parquet":
                    below = file.parent.relative_to(folder)
                    target = out / below / f"part-{numbers[str(below)]:05d}.parquet"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    numbers[str(below)] += 1
                    link_or_copy(file, target)


def link_or_copy(file: Path, target: Path) -> None:
    """Hard-link a file to `target`, or copy it where links are not possible."""
    try:
        target.hardlink_to(file)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, target)


def process_parts(ctx: Context, label: str, function: Work[Part], parts: Sequence[Part]) -> PartResults:
    """Process every part that is not done yet, on the context's worker pool.

    `function(part, folder)` is a module-level function or a partial of one, and returns a JSON object.
    """
    plan = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]  # another plan must not reuse these folders
    folders = [ctx.scratch / f"{label}-{plan}" / f"{i:06d}" for i in range(len(parts))]
    left = [i for i, folder in enumerate(folders) if not (folder / SUMMARY).exists()]
    if len(left) < len(parts):
        ctx.progress.log(f"{label}: resuming, {len(parts) - len(left)} of {len(parts)} parts are already done")
    with ctx.progress.bar(label, len(parts), "parts") as bar:
        bar.resume(len(parts) - len(left))
        for _ in ctx.pool.map(partial(_process_part, function), [(parts[i], folders[i]) for i in left]):
            bar.advance()
    return PartResults(folders, [json.loads((folder / SUMMARY).read_text(encoding="utf-8")) for folder in folders])


def _process_part(function: Work[Part], unit: tuple[Part, Path]) -> None:
    part, folder = unit
    if (folder / SUMMARY).exists():  # done by a worker pool that died before reporting it
        return
    if folder.exists():  # interrupted before
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    summary = function(part, folder)
    draft = folder / (SUMMARY + ".tmp")
    draft.write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
    draft.rename(folder / SUMMARY)
