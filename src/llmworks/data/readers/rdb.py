"""Read R lazy-load databases (`.rdb`): each stored character vector is one document, its elements are lines.

Objects are length-prefixed zlib streams of R's XDR serialization (R Internals, section 1.8). Only character vectors
are read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from llmworks.core.documents import RejectedInput
from llmworks.core.types import Document
from llmworks.data.readers.input_files import InputFile
from llmworks.data.readers.text import read_limited, size_limit_reason

STRINGS, STRING, MISSING = 16, 9, 0xFFFFFFFF  # SEXP types STRSXP and CHARSXP, the length of NA


def read_rdb(source: InputFile, limit: int) -> Iterator[Document | RejectedInput]:
    """Read one document per object that is a character vector."""
    with source.open() as stream:
        data = read_limited(stream, limit)
    if data is None:
        yield RejectedInput(source.name, 0, size_limit_reason(limit))
        return
    at = number = 0
    while at + 4 < len(data):
        number += 1
        unpack = zlib.decompressobj()
        try:
            value = unpack.decompress(data[at + 4 :], limit)
        except zlib.error as error:
            yield RejectedInput(source.name, number, f"the rest of the file is not an R database ({error})")
            return
        if not unpack.eof:
            yield RejectedInput(source.name, number, "truncated, or longer than max_document_mb")
            return
        at = len(data) - len(unpack.unused_data)
        try:
            lines = parse_strings(value)
        except (struct.error, ValueError) as error:
            yield RejectedInput(source.name, number, f"an object that is not a character vector ({error})")
            continue
        yield Document(f"{source.name}#{number}", "\n".join(lines), source.name)


def parse_strings(value: bytes) -> list[str]:
    """Parse the elements of a serialized character vector.

    ValueError for anything else, struct.error when it is truncated.
    """
    if value[:2] != b"X\n":
        raise ValueError("not in XDR format")
    (version,) = struct.unpack_from(">i", value, 2)
    at = 14
    if version == 3:  # the name of the encoding follows
        at += 4 + struct.unpack_from(">i", value, at)[0]
    flags, count = struct.unpack_from(">II", value, at)
    at += 8
    if flags & 0xFF != STRINGS:
        raise ValueError(f"type {flags & 0xFF}")
    found = []
    for _ in range(count):
        kind, size = struct.unpack_from(">II", value, at)
        if kind & 0xFF != STRING:
            raise ValueError(f"an element of type {kind & 0xFF}")
        at += 8
        if size == MISSING:
            continue
        raw = value[at : at + size]
        if len(raw) < size:
            raise ValueError("truncated")
        found.append(raw.decode("latin-1" if kind & 0x4000 else "utf-8", "replace"))  # bit 2 of the levels: Latin-1
        at += size
    return found
