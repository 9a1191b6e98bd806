"""Read web archives (WARC, with warcio): every HTML or text response, with its URL."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, cast

from llmworks.core.documents import RejectedInput
from llmworks.core.errors import MissingDependency
from llmworks.core.types import Document
from llmworks.data.readers.html import HtmlContent, extract_page_text
from llmworks.data.readers.input_files import InputFile
from llmworks.data.readers.text import NotTextError, decode_document, read_limited, size_limit_reason


def read_warc(source: InputFile, limit: int, content: HtmlContent) -> Iterator[Document | RejectedInput]:
    """Read one document per response with status 200. Other records are skipped; pages without content are rejected."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise MissingDependency("reading WARC needs the extra: pip install 'llmworks[documents]'") from None

    number = 0
    with source.open() as stream:
        if (
            not cast(io.BufferedReader, stream).peek(5).startswith(b"WARC/")
        ):  # warcio accepts any text as an old ARC file
            yield RejectedInput(source.name, 0, "no WARC records")
            return
        try:
            for record in ArchiveIterator(stream):
                number += 1
                if (
                    record.rec_type == "response"
                    and record.http_headers is not None
                    and record.http_headers.get_statuscode() == "200"
                ):
                    yield from _convert_response(record, source.name, number, limit, content)
        except ArchiveLoadFailed as error:
            yield RejectedInput(source.name, number + 1, f"not readable as WARC ({str(error).strip().splitlines()[0]})")


def _convert_response(
    record: Any, name: str, number: int, limit: int, content: HtmlContent
) -> Iterator[Document | RejectedInput]:
    url = record.rec_headers.get_header("WARC-Target-URI") or ""
    kind = (record.http_headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if kind not in ("text/html", "application/xhtml+xml", "text/plain"):
        return
    data = read_limited(record.content_stream(), limit)
    if data is None:
        yield RejectedInput(name, number, size_limit_reason(limit), url)
        return
    try:
        text, title = (
            (decode_document(data)[0].strip(), "") if kind == "text/plain" else extract_page_text(data, content)
        )
    except NotTextError as error:
        yield RejectedInput(name, number, str(error), url)
        return
    if not text:
        yield RejectedInput(name, number, "a page without content", url)
        return
    yield Document(f"{name}#{number}", text, name, {"url": url, **({"title": title} if title else {})})
