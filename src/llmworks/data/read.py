"""Stage `data.read`: read raw files of many formats into documents, as a stream; unusable ones are rejected with the
reason.

The format is taken from the suffix; files with an unknown suffix are read as text. The readers are in `readers/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, RejectedFile, RejectedInput
from llmworks.core.errors import DataError
from llmworks.core.types import Document, Json
from llmworks.data.card import finish_dataset
from llmworks.data.store.parts import PART_BYTES, process_parts

if TYPE_CHECKING:
    from llmworks.data.readers.input_files import InputFile

HTML = (".html", ".htm", ".xhtml")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PART_FILES = 256
ARROW_METADATA = frozenset(
    {"dataset_info.json", "dataset_dict.json", "state.json"}
)  # beside the .arrow files of a saved `datasets` directory


class ReadConfig(Config):
    """Conversion of rows and pages to documents."""

    text_field: str = Field("text", description="field with the text, in rows of JSONL, JSON, CSV, Parquet or Arrow")
    id_field: str = Field("", description="field with the document id; default: file and row number")
    keep_fields: list[str] | None = Field(None, description="fields kept as metadata; default: all others")
    html: Literal["main", "all"] = Field(
        "main", description="main: main content without navigation and boilerplate; all: all text"
    )
    max_document_mb: int = Field(64, gt=0, le=1024, description="longer documents are rejected")
    max_expanded_mb: int = Field(20_000, gt=0, description="maximum expanded size of one compressed file or archive")


@dataclass(frozen=True)
class FileBatch:
    """One work unit: some files below `root`."""

    root: Path
    files: tuple[Path, ...]


def read(config: ReadConfig, data: Dataset, ctx: Context) -> Dataset:
    """Read every file of `data`, also compressed ones and those in zip or tar archives.

    Formats: text, Markdown, HTML, PDF, JSON, JSONL, CSV, Parquet, Arrow, WARC, R data.

    Errors: DataError when there is no file, or none gives a document; MissingDependency for HTML, PDF or WARC without
    the extra.
    """
    from llmworks.data.readers.input_files import find_files

    files = find_files(data.path, _is_arrow_metadata)
    if not files:
        raise DataError(f"{data.path}: contains no files")
    done = process_parts(ctx, "read", partial(_read_files, config), batch_files(data.path, files))
    done.gather(ctx.out)
    metrics = {
        "files": len(files),
        "documents": done.sum_values("documents"),
        "characters": done.sum_values("characters"),
        "rejected": done.sum_counters("reasons").total(),
    }
    first = next((s["first"] for s in done.summaries if s["first"]), "")
    if not metrics["documents"]:
        raise DataError(f"{data.path}: none of {len(files)} files gives a document{': ' if first else ''}{first}")
    if first:
        ctx.progress.log(f"{metrics['rejected']} rejected (rejected.jsonl), the first: {first}")
    _report(ctx, data, metrics, done.sum_counters("formats"), done.sum_counters("reasons"))
    note = "; ".join(f"rejected: {reason} {n:,}" for reason, n in done.sum_counters("reasons").most_common())
    return finish_dataset(ctx, "data.read", [data], metrics=metrics, note=note, extra={"rejected": metrics["rejected"]})


def batch_files(root: Path, files: Sequence[Path]) -> list[FileBatch]:
    """Group files, in their order, into parts of about PART_BYTES or of PART_FILES, whichever comes first."""
    parts: list[list[Path]] = [[]]
    size = 0
    for file in files:
        if parts[-1] and (size + file.stat().st_size > PART_BYTES or len(parts[-1]) == PART_FILES):
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += file.stat().st_size
    return [FileBatch(root, tuple(part)) for part in parts]


def _read_files(config: ReadConfig, part: FileBatch, folder: Path) -> Json:
    from llmworks.data.readers.input_files import make_input_file

    formats: Counter[str] = Counter()
    with DocumentWriter(folder) as writer, RejectedFile(folder) as rejected:
        for file in part.files:
            for item in read_source(make_input_file(part.root, file), config):
                if isinstance(item, RejectedInput):
                    rejected.add(item)
                else:
                    writer.add(item)
                    formats[_detect_format(item.source)] += 1
    first = f"{rejected.first.file}: {rejected.first.reason}" if rejected.first else ""
    return {
        "documents": writer.documents,
        "characters": writer.characters,
        "formats": formats,
        "reasons": rejected.reasons,
        "first": first,
    }


def read_source(file: InputFile, config: ReadConfig) -> Iterator[Document | RejectedInput]:
    """Yield the documents of one file or archive, or an Unusable with the reason where it cannot be read."""
    from llmworks.data.readers.input_files import BROKEN, TooLarge, expand_archives

    for source in expand_archives(file, config.max_expanded_mb << 20):
        if isinstance(source, RejectedInput):
            yield source
            continue
        try:
            yield from _read_format(source, config)
        except TooLarge as error:
            yield RejectedInput(source.name, 0, f"{error} (max_expanded_mb)")
        except BROKEN as error:
            yield RejectedInput(source.name, 0, f"cannot be read ({error or type(error).__name__})")


def _read_format(source: InputFile, config: ReadConfig) -> Iterator[Document | RejectedInput]:
    from llmworks.data.readers import pdf, rdb, tables, text, warc

    limit = config.max_document_mb << 20
    fields = tables.TableFields(
        config.text_field, config.id_field, limit, None if config.keep_fields is None else frozenset(config.keep_fields)
    )
    match source.suffix:
        case ".jsonl" | ".ndjson":
            yield from tables.read_jsonl_rows(source, fields)
        case ".json":
            yield from tables.read_json(source, fields)
        case ".csv" | ".tsv":
            yield from tables.read_csv(source, fields)
        case ".parquet":
            yield from tables.read_parquet(source, fields)
        case ".arrow":
            yield from tables.read_arrow(source, fields)
        case ".pdf":
            yield from pdf.read_pdf(source, limit)
        case ".rdb":
            yield from rdb.read_rdb(source, limit)
        case ".warc":
            yield from warc.read_warc(source, limit, config.html)
        case suffix if suffix in HTML:
            yield from _read_page(source, limit, config)
        case _:
            yield from text.read_text(source, limit)


def _read_page(source: InputFile, limit: int, config: ReadConfig) -> Iterator[Document | RejectedInput]:
    from llmworks.data.readers.html import extract_page_text
    from llmworks.data.readers.text import NotTextError, read_limited, size_limit_reason

    with source.open() as stream:
        data = read_limited(stream, limit)
    if data is None:
        yield RejectedInput(source.name, 0, size_limit_reason(limit))
        return
    try:
        text, title = extract_page_text(data, config.html)
    except NotTextError as error:
        yield RejectedInput(source.name, 0, str(error))
        return
    if text:
        yield Document(source.name, text, source.name, {"title": title} if title else {})
    else:
        yield RejectedInput(source.name, 0, "a page without content")


def _is_arrow_metadata(path: Path) -> bool:
    return path.name in ARROW_METADATA and (path.name == "dataset_dict.json" or any(path.parent.glob("*.arrow")))


def _detect_format(source: str) -> str:
    name = source.rpartition("!")[2].lower()
    for suffix in (*TABLES, *HTML, ".pdf", ".warc", ".rdb", ".md", ".rst", ".txt"):
        if suffix in name:
            return suffix[1:]
    return "text"


def _report(
    ctx: Context, data: Dataset, metrics: Mapping[str, int], formats: Counter[str], reasons: Counter[str]
) -> None:
    report = ctx.report
    report.title = f"Documents of {data.name}"
    mean = metrics["characters"] / metrics["documents"]
    report.subtitle = (
        f"{metrics['documents']:,} documents, {mean:,.0f} characters on average; {metrics['rejected']:,} rejected."
    )
    report.data = {"documents": metrics["documents"], "formats": dict(formats), "reasons": dict(reasons)}
    report.add_table("Documents by format", ("format", "documents"), formats.most_common())
    if reasons:
        report.add_table(
            "Rejected", ("reason", "count"), reasons.most_common(), note="rejected.jsonl lists each with its location."
        )
