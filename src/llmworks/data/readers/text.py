"""Decode text of unknown encoding: BOM, UTF-8, else detection; binary data is rejected."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator
from typing import IO

from llmworks.core.documents import RejectedInput
from llmworks.core.types import Document
from llmworks.data.readers.input_files import InputFile

SAMPLE = 1 << 16
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# 8-bit encodings of the Latin script differ in too few letters for a general detector: the letters of each language
# decide, ties go to the first
LETTERS = {
    "cp1252": "àâæçéèêëîïôœùûüÿñ äöüßéà áéíóúüñçàòï ãáâàçéêíóôõúü àèéìíòóù åäöæøéà ëïéóüèêö áéíóúýþæöð",
    "cp1250": "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîşţșț čćđšž",
    "iso8859_2": "ąćęłńóśźż áčďéěíňóřšťúůýž áéíóöőúüű ăâîşţ",
    "cp1254": "çğıöşüâîûi̇",
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž äõöüšž",
}
MARKS = frozenset("\xa0“”„‘’‚–—…•·€£¥«»‹›§©®™°±×÷¿¡ªº½¼¾²³¹µ¶†‡‰\xad")
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f\x08\x1b")


class NotTextError(ValueError):
    """Bytes that are not text in any supported encoding."""


def detect_encoding(data: bytes) -> str:
    """Detect the encoding from the beginning of a text. NotText for binary data."""
    for bom, name in BOMS:
        if data.startswith(bom):
            return name
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # a character truncated at the end is not an error
    except UnicodeDecodeError:
        pass
    else:
        if _is_binary(data):
            raise NotTextError("binary data, not text")
        return "utf-8"
    if _is_binary(data):
        raise NotTextError("binary data, not text")
    return _detect_legacy_encoding(data)


def _detect_legacy_encoding(data: bytes) -> str:
    """Detect the most likely encoding from the non-ASCII lines; ASCII lines carry no evidence."""
    from charset_normalizer import from_bytes

    non_ascii = b"\n".join(line for line in data.splitlines() if not line.isascii())
    first = next(i for i, byte in enumerate(non_ascii) if byte > 127)
    sample = non_ascii[max(0, first - 1000) : first + SAMPLE]
    best = from_bytes(sample).best()
    if best is None:
        raise NotTextError("text in an unknown encoding")
    if best.encoding.startswith(("utf_16", "utf_32")):  # a guess from a few bytes: real ones have NUL bytes, or a BOM
        return max(LETTERS, key=lambda encoding: _covered_fraction(sample, encoding))
    if not any("LATIN" in unicodedata.name(char, "") for char in str(best) if char > "\x7f"):
        return best.encoding
    covered = {encoding: _covered_fraction(sample, encoding) for encoding in LETTERS}
    likeliest = max(covered, key=lambda encoding: covered[encoding])
    return likeliest if covered[likeliest] > 0.9 else best.encoding


def _covered_fraction(data: bytes, encoding: str) -> float:
    """Return the fraction of non-ASCII characters that the best-matching language of an encoding uses."""
    try:
        beyond = [char for char in data.decode(encoding).lower() if char > "\x7f" and char not in MARKS]
    except UnicodeDecodeError:
        return 0.0
    return (
        max(
            (sum(char in letters for char in beyond) / len(beyond) for letters in LETTERS[encoding].split()),
            default=0.0,
        )
        if beyond
        else 1.0
    )


def _is_binary(data: bytes) -> bool:
    return b"\0" in data or sum(byte in _CONTROL for byte in data) > len(data) / 100


def read_limited(stream: IO[bytes], limit: int) -> bytes | None:
    """Read the whole stream; None when it has more than `limit` bytes."""
    blocks: list[bytes] = []
    size = 0
    while block := stream.read(1 << 20):
        size += len(block)
        if size > limit:
            return None
        blocks.append(block)
    return b"".join(blocks)


def decode_document(data: bytes) -> tuple[str, str]:
    """Decode a whole document to (text, encoding). NotText for binary data."""
    encoding = detect_encoding(data[:SAMPLE])
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError:  # the sample was ASCII, the rest is not UTF-8
        if _is_binary(data):
            raise NotTextError("binary data, not text") from None
        encoding = _detect_legacy_encoding(data)
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            raise NotTextError("text in an unknown encoding") from None


def size_limit_reason(limit: int) -> str:
    """Return the reject reason for a document above the size limit."""
    return f"longer than {limit >> 20} MB (max_document_mb)"


def read_text(source: InputFile, limit: int) -> Iterator[Document | RejectedInput]:
    """Read one document: the whole file, with line ends normalized."""
    with source.open() as stream:
        data = read_limited(stream, limit)
    if data is None:
        yield RejectedInput(source.name, 0, size_limit_reason(limit))
        return
    try:
        text, encoding = decode_document(data)
    except NotTextError as error:
        yield RejectedInput(source.name, 0, str(error))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        yield RejectedInput(source.name, 0, "empty")
        return
    yield Document(
        source.name, text, source.name, {} if encoding in ("utf-8", "utf-8-sig", "ascii") else {"encoding": encoding}
    )
