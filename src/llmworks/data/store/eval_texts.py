"""Read rows of evaluation sets as plain text, for any schema: documents, conversations, or raw JSON rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError
from llmworks.data.store.rows import detect_schema

RAW = (".jsonl", ".ndjson", ".json")
LIMIT = 64 << 20


def read_eval_rows(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every row: for a conversation all turns and the answer, for a JSON row all its strings.

    Errors: DataError for a dataset of another schema, or without rows.
    """
    count = 0
    for id, text in _read_texts(dataset):
        count += 1
        yield id, text
    if not count:
        raise DataError(f"{dataset.name}: has no rows to compare")


def _read_texts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    schema = (dataset.manifest.about.get("schema") if dataset.manifest else None) or detect_schema(dataset)
    parquet = dataset.path.is_dir() and any(dataset.path.glob("*.parquet"))
    if parquet and schema == "chat":
        from llmworks.data.store.rows import flatten_messages, read_chat

        for row in read_chat(dataset):
            yield (
                row["id"],
                "\n".join([*(m.content for m in flatten_messages(row) if m.content), *collect_strings(row["answer"])]),
            )
    elif parquet:
        for document in read_documents(dataset):
            yield document.id, document.text
    else:
        yield from _read_raw_texts(dataset)


def _read_raw_texts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    import json

    from llmworks.core.documents import RejectedInput
    from llmworks.data.readers.input_files import expand_archives, find_files, make_input_file
    from llmworks.data.readers.tables import iter_lines

    for file in find_files(dataset.path):
        for item in expand_archives(make_input_file(dataset.path, file), 1 << 30):
            if isinstance(item, RejectedInput) or item.suffix not in RAW:
                raise DataError(
                    f"{file}: only documents, conversations and JSON rows can be compared; create documents with the"
                    " stage data.read"
                )
            with item.open() as stream:
                try:
                    if item.suffix == ".json":
                        value = json.load(stream)
                        rows: list[Any] = value if isinstance(value, list) else [value]
                    else:
                        rows = [
                            json.loads(line)
                            for _, line in iter_lines(stream, LIMIT)
                            if line is not None and line.strip()
                        ]
                except ValueError as error:
                    raise DataError(f"{file}: not JSON ({error})") from None
            for number, row in enumerate(rows, 1):
                yield f"{item.name}#{number}", "\n".join(collect_strings(row))


def collect_strings(value: Any) -> list[str]:
    """Collect every string in a JSON value, without keys."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in collect_strings(item)] if isinstance(value, list) else []
