"""Read web archives (WARC, with warcio): every HTML or text response, with its URL."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, cast

from llmworks.core.documents import Unusable
from llmworks.core.errors import MissingDependency
from llmworks.core.types import Document
from llmworks.data.readers.html import Part, page_text
from llmworks.data.readers.source import Source
from llmworks.data.readers.text import NotText, decode, read_limited, too_long


def read_warc(source: Source, limit: int, part: Part) -> Iterator[Document | Unusable]:
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
            yield Unusable(source.name, 0, "no WARC records")
            return
        try:
            for record in ArchiveIterator(stream):
                number += 1
                if (
                    record.rec_type == "response"
                    and record.http_headers is not None
                    and record.http_headers.get_statuscode() == "200"
                ):
                    yield from _response(record, source.name, number, limit, part)
        except ArchiveLoadFailed as error:
            yield Unusable(source.name, number + 1, f"not readable as WARC ({str(error).strip().splitlines()[0]})")


def _response(record: Any, name: str, number: int, limit: int, part: Part) -> Iterator[Document | Unusable]:
    url = record.rec_headers.get_header("WARC-Target-URI") or ""
    kind = (record.http_headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if kind not in ("text/html", "application/xhtml+xml", "text/plain"):
        return
    data = read_limited(record.content_stream(), limit)
    if data is None:
        yield Unusable(name, number, too_long(limit), url)
        return
    try:
        text, title = (decode(data)[0].strip(), "") if kind == "text/plain" else page_text(data, part)
    except NotText as error:
        yield Unusable(name, number, str(error), url)
        return
    if not text:
        yield Unusable(name, number, "a page without content", url)
        return
    yield Document(f"{name}#{number}", text, name, {"url": url, **({"title": title} if title else {})})
