"""Read Spider text-to-SQL questions in OpenAI evals' format (schema, question, gold query) and build test databases.

The dataset ships without databases, so each question gets a synthetic one: rows of small numbers and of literals from
the query, resampled until the query returns a result (the idea of distilled test suites, Zhong et al. 2020). Queries
that differ in meaning then mostly differ in their results.
"""

from __future__ import annotations

import random
import re
import sqlite3
from pathlib import Path
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, messages_to_json
from llmworks.data.store.jsonl import RejectedRows, read_jsonl
from llmworks.data.store.rows import Row

TABLE = re.compile(r"^Table: (.*?)\. Columns: (.*)$", re.MULTILINE)
COLUMN = re.compile(r"(.+) \((\w+)\)")
LITERAL = re.compile(r"'([^']*)'|\"([^\"]*)\"")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")
WORDS = ("red", "blue", "north", "Ada", "Ben", "Cleo", "spring", "winter")
ROWS, TRIES = 12, 60


def rows(path: Path, rejected: RejectedRows) -> list[Row]:
    """Read chat rows: tables and question, gold query; `answer` has the query and the database to execute it on."""
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.jsonl"))
    if not files:
        raise DataError(f"{path}: format spider takes a JSONL file")
    found: list[Row] = []
    for file in files:
        for line, raw in read_jsonl(file, rejected):
            try:
                question, query = str(raw["input"][-1]["content"]).strip(), str(raw["ideal"])
                tables = parse_tables(question)
                setup = build_database(tables, query, seed=line)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                rejected.add(
                    file.name,
                    line,
                    str(error) if isinstance(error, ValueError) else "not a question with tables and a gold query",
                    str(raw),
                )
                continue
            turns = (Message("user", question), Message("assistant", f"```sql\n{query.strip()}\n```"))
            group = "+".join(sorted(name.lower() for name, _ in tables))
            found.append(
                {
                    "id": f"spider-{line}",
                    "group": group,
                    "messages": messages_to_json(turns),
                    "tools": [],
                    "answer": {"sql": query, "setup": setup},
                    "extra": {"fields": {"tables": len(tables)}},
                }
            )
    return found


def parse_tables(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Parse (name, [(column, type)]) of every table that a question lists. ValueError when it lists none."""
    found = []
    for name, columns in TABLE.findall(text):
        parts = [COLUMN.fullmatch(part) for part in re.split(r", (?=[^,()]+ \(\w+\))", columns)]
        if not all(parts):
            raise ValueError(f"the columns of table {name!r} cannot be parsed")
        found.append((name, [(part[1], part[2]) for part in parts if part]))
    if not found:
        raise ValueError("lists no tables")
    return found


def build_database(tables: list[tuple[str, list[tuple[str, str]]]], query: str, seed: int) -> str:
    """Generate SQL that fills tables so that the query returns rows. ValueError when TRIES attempts fail."""
    words = [a or b for a, b in LITERAL.findall(query)]
    words = [w.strip("%") for w in words if w.strip("%")]
    numbers = [float(n) if "." in n else int(n) for n in NUMBER.findall(query) if float(n) < 1e9]
    failure = "returns nothing on synthetic data"
    for attempt in range(TRIES):
        rng = random.Random(f"{seed}/{attempt}")
        lines = []
        for number, (name, columns) in enumerate(tables):
            if name.startswith("sqlite_"):  # SQLite creates these itself
                continue
            names = ", ".join(f'"{column}" {_sql_type(kind)}' for column, kind in columns)
            lines.append(f'CREATE TABLE "{name}" ({names});')
            for place in range(ROWS + number):  # otherwise all tables would have equally many rows
                values = ", ".join(
                    _sql_value(rng, kind, words, numbers, place, first=i == 0) for i, (_, kind) in enumerate(columns)
                )
                lines.append(f'INSERT INTO "{name}" VALUES ({values});')
        setup = "\n".join(lines)
        try:
            with sqlite3.connect(":memory:") as memory:
                memory.executescript(setup)
                results = memory.execute(query).fetchmany(1000)
        except (sqlite3.Error, sqlite3.Warning) as error:
            failure = f"cannot be run ({error})"
            break
        finally:
            memory.close()
        if results and any(value not in (None, 0, "") for row in results for value in row):
            return setup
    raise ValueError(f"its query {failure}")


def _sql_type(kind: str) -> str:
    return "REAL" if kind == "number" else "TEXT"


def _sql_value(rng: random.Random, kind: str, words: list[str], numbers: list[Any], place: int, *, first: bool) -> str:
    if first and kind == "number":
        return str(place + 1)  # usually a primary key
    if kind == "number":
        some = (
            rng.choice(numbers) + rng.choice((-1, 0, 0, 1)) if numbers and rng.random() < 0.4 else rng.randint(1, ROWS)
        )
        return str(some)
    if kind == "time":
        return f"'{rng.randint(2000, 2020)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}'"
    word = (
        rng.choice(words)
        if words and rng.random() < 0.5
        else (
            str(rng.choice(numbers))
            if numbers and rng.random() < 0.2
            else rng.choice(WORDS)
            if rng.random() < 0.7
            else str(rng.randint(1, ROWS))
        )
    )
    return "'" + word.replace("'", "''") + "'"
