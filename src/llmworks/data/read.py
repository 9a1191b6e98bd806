"""Stage `data.read`: raw files of many formats become documents, as a stream; what gives none is set aside with its reason.

Formats are told by the suffix, a file without a known one is text. The readers live in `formats/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmworks.artifact import Config, Dataset
from llmworks.context import Context
from llmworks.data.documents import DocumentWriter, SideFile, Unusable
from llmworks.errors import DataError
from llmworks.types import Document

if TYPE_CHECKING:
    from llmworks.data.formats.source import Source

HTML = (".html", ".htm", ".xhtml")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SKIPPED = frozenset({"dataset_info.json", "dataset_dict.json", "state.json"})  # beside the .arrow files of a saved `datasets` directory


class ReadConfig(Config):
    """How rows and pages become documents."""

    text_field: str = Field("text", description="field of a row (JSONL, JSON, CSV, Parquet, Arrow) that holds the text")
    id_field: str = Field("", description="field of a row that is the document's id; default: its file and number")
    html: Literal["main", "all"] = Field("main", description="main: a page's content without navigation; all: all its text")
    max_document_mb: int = Field(64, gt=0, le=1024, description="longer documents are set aside")
    max_expanded_mb: int = Field(20_000, gt=0, description="what one compressed file or archive may expand to")


def read(config: ReadConfig, data: Dataset, ctx: Context) -> Dataset:
    """Read every file of `data`: text, Markdown, HTML, PDF, JSON, JSONL, CSV, Parquet, Arrow, WARC; also compressed, or in zip or tar.

    Errors: DataError when there is no file, or none gives a document; MissingDependency for HTML, PDF or WARC without the extra.
    """
    from llmworks.data.formats.source import sources

    files = list(sources(data.path, _beside_arrow))
    if not files:
        raise DataError(f"{data.path}: holds no files")
    formats: Counter[str] = Counter()
    with DocumentWriter(ctx.out) as writer, SideFile(ctx.out) as aside, ctx.progress.bar("read", len(files), "files") as bar:
        for file in files:
            for item in documents(file, config):
                if isinstance(item, Unusable):
                    aside.add(item)
                else:
                    writer.add(item)
                    formats[_format(item.source)] += 1
            bar.advance(1, documents=writer.documents)
    if not writer.documents:
        first = f": {aside.first.file}: {aside.first.reason}" if aside.first else ""
        raise DataError(f"{data.path}: none of {len(files)} files gives a document{first}")
    if aside.first:
        ctx.progress.say(f"{aside.count} set aside in rejected.jsonl, the first: {aside.first.file}: {aside.first.reason}")
    _report(ctx, data, writer, aside, formats)
    metrics = {"files": len(files), "documents": writer.documents, "characters": writer.characters, "rejected": aside.count}
    return Dataset(ctx.out, metrics=metrics, about={"schema": "text", "documents": writer.documents, "rejected": aside.count})


def documents(file: Source, config: ReadConfig) -> Iterator[Document | Unusable]:
    """What one file gives: its documents, or those of what it holds. A file that cannot be read gives its reason."""
    from llmworks.data.formats.source import BROKEN, TooLarge, expand

    for source in expand(file, config.max_expanded_mb << 20):
        if isinstance(source, Unusable):
            yield source
            continue
        try:
            yield from _read(source, config)
        except TooLarge as error:
            yield Unusable(source.name, 0, f"{error} (max_expanded_mb)")
        except BROKEN as error:
            yield Unusable(source.name, 0, f"cannot be read ({error or type(error).__name__})")


def _read(source: Source, config: ReadConfig) -> Iterator[Document | Unusable]:
    from llmworks.data.formats import pdf, tables, text, warc

    limit = config.max_document_mb << 20
    fields = tables.Fields(config.text_field, config.id_field, limit)
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
        case ".warc":
            yield from warc.read_warc(source, limit, config.html)
        case suffix if suffix in HTML:
            yield from _page(source, limit, config)
        case _:
            yield from text.read_text(source, limit)


def _page(source: Source, limit: int, config: ReadConfig) -> Iterator[Document | Unusable]:
    from llmworks.data.formats.html import page_text
    from llmworks.data.formats.text import NotText, read_limited, too_long

    with source.open() as stream:
        data = read_limited(stream, limit)
    if data is None:
        yield Unusable(source.name, 0, too_long(limit))
        return
    try:
        text, title = page_text(data, config.html)
    except NotText as error:
        yield Unusable(source.name, 0, str(error))
        return
    if text:
        yield Document(source.name, text, source.name, {"title": title} if title else {})
    else:
        yield Unusable(source.name, 0, "a page without content")


def _beside_arrow(path: Path) -> bool:
    return path.name in SKIPPED and (path.name == "dataset_dict.json" or any(path.parent.glob("*.arrow")))


def _format(source: str) -> str:
    name = source.rpartition("!")[2].lower()
    for suffix in (*TABLES, *HTML, ".pdf", ".warc", ".md", ".rst", ".txt"):
        if suffix in name:
            return suffix[1:]
    return "text"


def _report(ctx: Context, data: Dataset, writer: DocumentWriter, aside: SideFile, formats: Counter[str]) -> None:
    report = ctx.report
    report.title = f"Documents of {data.name}"
    mean = writer.characters / writer.documents
    report.lead = f"{writer.documents:,} documents, {mean:,.0f} characters on average; {aside.count:,} set aside."
    report.data = {"documents": writer.documents, "formats": dict(formats), "reasons": dict(aside.reasons)}
    report.table("Documents by format", ("format", "documents"), formats.most_common())
    if aside.reasons:
        report.table("Set aside", ("reason", "how many"), aside.reasons.most_common(), note="Each with its place in rejected.jsonl.")
