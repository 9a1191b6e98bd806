"""Rows of CSV and TSV files as spreadsheets write them: any encoding, comma, semicolon, tab or bar, long fields.

One reader for documents and conversations. A row whose number of fields differs from the header's is rejected: an
unquoted comma would cut its last field.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmworks.data.readers.input_files import InputFile
from llmworks.data.readers.text import SAMPLE, detect_encoding

DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class RejectedCsvRow:
    """A row that cannot be read, and why. `rest`: the rows after it cannot be read either."""

    reason: str
    text: str = ""
    rest: bool = False


def iter_csv_rows(source: InputFile, max_bytes: int) -> Iterator[tuple[int, dict[str, Any] | RejectedCsvRow]]:
    """Yield (row number from 1, row), where the first row of the file is the header.

    `max_bytes`: longest field. Errors: NotTextError for binary data.
    """
    with source.open() as stream:
        head = stream.read(SAMPLE)
    encoding = detect_encoding(head)
    text = head.decode(encoding, "replace")
    skip = text.startswith(("sep=", "SEP="))  # how Excel is told the delimiter
    delimiter = text[4] if skip and len(text) > 4 else detect_delimiter(text, tab=source.suffix == ".tsv")
    previous = csv.field_size_limit(max_bytes)
    number = 0
    try:
        with source.open() as stream:
            lines = io.TextIOWrapper(stream, encoding, newline="")
            if skip:
                lines.readline()
            table = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(table, [])
            for fields in table:
                if not fields:  # an empty line
                    continue
                number += 1
                if len(fields) != len(names):
                    reason = (
                        f"has {len(fields)} fields, the header {len(names)}; quote fields that contain {delimiter!r}"
                    )
                    yield number, RejectedCsvRow(reason, delimiter.join(fields)[:2000])
                else:
                    yield number, dict(zip(names, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        yield number + 1, RejectedCsvRow(f"the rest of the table cannot be read ({error})", rest=True)
    finally:
        csv.field_size_limit(previous)


def detect_delimiter(text: str, *, tab: bool = False) -> str:
    """Return the delimiter that divides the header into the most fields; the comma, or for .tsv the tab, on a tie."""
    first = "\t" if tab else ","
    header = text.splitlines()[0] if text.strip() else ""
    counts = {one: len(next(csv.reader([header], delimiter=one), [])) for one in (first, *DELIMITERS)}
    return max(counts, key=lambda one: counts[one])
