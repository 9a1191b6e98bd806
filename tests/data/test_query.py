"""SQL rows become documents; the database is only read; what is wrong is one line, and no secret is written down."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import read_documents


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "notes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table notes (id integer primary key, body text, author text, stars real, raw blob)")
        connection.executemany(
            "insert into notes (body, author, stars, raw) values (?, ?, ?, ?)",
            [
                ("first note", "ann", 4.5, b"\0\1"),
                (None, "bob", None, None),
                ("third: 50% off :tag", "cy", 1.0, None),
                ("  ", "di", 0, None),
            ],
        )
    connection.close()
    return path


def run(*words: str) -> int:
    return main(["data", "query", *words, "--quiet"])


def test_rows_become_documents(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    config = tmp_path / "query.yaml"
    config.write_text(
        "sql: \"select * from notes where author like '%' order by id\"\ntext_field: body\nid_field: id\n"
    )
    assert run("--database", str(database), "--config", str(config), "--out", str(tmp_path / "out")) == 0
    made = list(read_documents(Dataset(tmp_path / "out")))
    assert [(d.id, d.text, d.source) for d in made] == [
        ("1", "first note", "notes.sqlite"),
        ("3", "third: 50% off :tag", "notes.sqlite"),
    ]
    assert made[0].metadata == {"author": "ann", "stars": 4.5, "raw": "AAE="}
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejected] == [
        (2, "field 'body' is not a string (NoneType)"),
        (4, "empty"),
    ]
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select text from nowhere", "no such table: nowhere"),
        ("selec 1", 'near "selec": syntax error'),
        ("delete from notes", "attempt to write a readonly database"),
        ("select body as text from notes where id > 99", "no row of the query gives a document"),
        ("select body from notes", "no field 'text' (it has body)"),
    ],
)
def test_what_is_wrong_is_one_line(
    database: Path,
    tmp_path: Path,
    sql: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    assert run("--database", str(database), "--set", f"sql={sql}", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert sqlite3.connect(database).execute("select count(*) from notes").fetchone() == (4,)


def test_a_url_with_a_secret(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    sql = "sql=select body as text from notes where body is not null"
    assert run("--set", sql, "--set", "url=postgresql://me:hunter2@host/db", "--out", str(tmp_path / "out")) == 2
    assert "hunter2" not in capsys.readouterr().err
    assert run("--set", sql, "--set", "url=sqlite:///${NOTES_PATH}", "--out", str(tmp_path / "out")) == 2
    assert "environment variable NOTES_PATH is not set" in capsys.readouterr().err
    assert run("--set", sql, "--out", str(tmp_path / "out")) == 2
    assert "either the input `database`" in capsys.readouterr().err
    monkeypatch.chdir(database.parent)
    monkeypatch.setenv("NOTES_PATH", database.name)
    assert run("--set", sql, "--set", "url=sqlite:///${NOTES_PATH}", "--out", str(tmp_path / "out")) == 0
    written = "".join(p.read_text() for p in (tmp_path / "ws/store").rglob("*.json"))
    assert "${NOTES_PATH}" in written
    assert database.name not in written


def test_no_sqlite_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "a.sqlite").write_text("not one")
    assert run("--database", str(tmp_path / "a.sqlite"), "--set", "sql=select 1", "--out", str(tmp_path / "out")) == 2
    assert "is not a SQLite file" in capsys.readouterr().err
