"""What a fine-tuning reads: conversations, documents, or rows of `prompt` and `completion` as they are. Knows no tokenizer."""

from __future__ import annotations

from llmworks.artifact import Dataset
from llmworks.data.jsonl import Rejected
from llmworks.data.rawrows import raw_rows
from llmworks.data.rows import Row, read_chat, schema_of
from llmworks.documents import read_documents
from llmworks.errors import DataError


def training_rows(data: Dataset) -> list[Row]:
    """Rows with an id and `messages`, or `text`, or `prompt` and `completion`. Errors: DataError for anything else, or rows that cannot be read."""
    parquet = data.path.is_dir() and any(data.path.glob("*.parquet"))
    if schema_of(data) == "chat":
        return read_chat(data)
    if parquet and _documents(data):
        return [{"id": document.id, "text": document.text} for document in read_documents(data)]
    if parquet and not data.about.get("schema"):
        return read_chat(data)  # which says what is wrong with it
    rejected, rows = Rejected(), []
    for file, number, row in raw_rows(data.path, rejected):
        where = f"{data.name}: {file} row {number}"
        names = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
        if "messages" in row or "conversations" in row:
            raise DataError(f"{where}: holds a conversation; make conversations of these rows first, with the stage data.chat")
        wrong = next((name for name in names if not isinstance(row.get(name), str)), None)
        if wrong:
            raise DataError(f"{where}: has no text {wrong!r}; a fine-tuning reads conversations (data.chat), documents, or rows of `text`, or of `prompt` and `completion`")
        rows.append({"id": str(row.get("id", number)), **{name: row[name] for name in names}})
    if rejected.rows:
        first = rejected.rows[0]
        raise DataError(f"{data.name}: {len(rejected.rows)} rows cannot be read, the first in {first['file']}:{first['line']}: {first['reason']}")
    if not rows:
        raise DataError(f"{data.name}: has no rows")
    return rows


def _documents(data: Dataset) -> bool:
    """Whether the Parquet files hold documents."""
    import pyarrow.parquet as pq

    file = min(data.path.glob("*.parquet"))
    try:
        return {"id", "text"} <= set(pq.read_schema(file).names)
    except (OSError, ValueError):
        return False
