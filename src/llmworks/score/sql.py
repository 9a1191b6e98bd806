"""Score a SQL query by its result: the same rows as the reference query on the same database, in in-memory SQLite.

Queries are read-only, with a timeout and a row limit. Rows are compared as a multiset, in order where the reference
has ORDER BY (execution accuracy of Spider, Yu et al. 2018). Without data all queries give the same result, so rows
need `answer.setup`.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.score.extract import extract_code_block

TIMEOUT, MAX_ROWS, STEPS_PER_CHECK, MAX_VALUE_BYTES = (
    5.0,
    20_000,
    10_000,
    1 << 20,
)  # timeout and row limit of a query, steps between timeout checks, bytes of a value
READ_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, 33}  # 33: SQLITE_RECURSIVE


def sql(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the completion's query gives the result of `answer.sql` on `answer.setup`.

    Errors: DataError for a row whose own query fails.
    """
    answer = row.get("answer")
    if (
        not isinstance(answer, Mapping)
        or not isinstance(answer.get("sql"), str)
        or not isinstance(answer.get("setup"), str)
    ):
        raise DataError(
            f'row {row.get("id")!r}: `answer` must be {{"sql": QUERY, "setup": SQL THAT CREATES THE DATABASE}}'
        )
    database = sqlite3.connect(":memory:")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    try:
        database.executescript(answer["setup"])
        expected = run_query(database, answer["sql"])
    except (sqlite3.Error, sqlite3.Warning) as error:
        database.close()
        raise DataError(f"row {row.get('id')!r}: its own setup or query fails ({error})") from None
    try:
        returned = run_query(database, extract_query(completion))
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError) as error:
        return Score(0.0, f"the query fails: {error}"[:160])
    finally:
        database.close()
    ordered = re.search(r"\border\s+by\b", answer["sql"], re.IGNORECASE) is not None
    equal = returned == expected if ordered else Counter(returned) == Counter(expected)
    return Score(1.0) if equal else Score(0.0, f"different rows: {len(returned)} returned, {len(expected)} expected")


def extract_query(completion: str) -> str:
    """Extract the query from a completion."""
    text = extract_code_block(completion, "sql", "sqlite")
    found = re.search(r"\b(?:select|with)\b.*", text, re.IGNORECASE | re.DOTALL)
    return (found[0] if found else text).split(";")[0].strip()


def run_query(database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a read-only query.

    Errors: sqlite3.Error for any other statement, or on a timeout or too many rows.
    """
    deadline = time.monotonic() + TIMEOUT
    database.set_progress_handler(lambda: int(time.monotonic() > deadline), STEPS_PER_CHECK)
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READ_ACTIONS else sqlite3.SQLITE_DENY)
    try:
        rows = database.execute(query).fetchmany(MAX_ROWS + 1)
    finally:
        database.set_authorizer(None)
        database.set_progress_handler(None, 0)
    if len(rows) > MAX_ROWS:
        raise sqlite3.OperationalError(f"more than {MAX_ROWS:,} rows")
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]
