"""Published sets: every row of the real files is read, its own answer passes its own check, and other answers mostly do
not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmworks import assets
from llmworks.cli import main
from llmworks.core.errors import DataError
from llmworks.data.published import flan_cot, spider
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.rows import Row
from llmworks.score import get_score_function

COT = (
    "The following are questions.\n\nQ: One plus one?\n(A) 1 (B) 2\nA: Let's think. It is two.\nThe answer is"
    " (B).\n\nQ: Broken?\n(A) x (B) y\nA: The answer is (C).\n\nQ: Last (A) a (B) b\nA: Sure. The answer is (A).\n"
)
ASKED = (
    "Use only these.\nTable: singer. Columns: Singer_ID (number), Name (text), Age (number)\nTable: song. Columns:"
    " Song_ID (number), Singer_ID (number), Title (text)\n\nQuestion: Which songs are by Ada?\n"
)


def test_worked_examples(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"sums": COT, "none": "no examples"}))
    rejected = RejectedRows()
    first, last = flan_cot.rows(tmp_path, rejected)
    assert first["messages"] == [
        {"role": "user", "content": "One plus one?\n(A) 1 (B) 2"},
        {"role": "assistant", "content": "Let's think. It is two.\nThe answer is (B)."},
    ]
    assert (first["id"], first["group"], first["answer"], last["answer"]) == ("sums-1", "sums", "(B)", "(A)")
    assert [r["reason"] for r in rejected.rows] == [
        "an example's answer is not one of its options",
        "no example (lines beginning with Q: and A:)",
    ]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="must be a JSON object that maps subjects"):
        flan_cot.rows(tmp_path, rejected)


def test_questions_get_databases(tmp_path: Path) -> None:
    query = "SELECT T2.Title FROM singer AS T1 JOIN song AS T2 ON T1.Singer_ID = T2.Singer_ID WHERE T1.Name = 'Ada'"
    rows = [
        {"input": [{"role": "system", "content": ASKED}], "ideal": q}
        for q in (query, "SELECT colour FROM singer", "SELECT Name FROM singer WHERE Age > 5 AND Age < 5")
    ]
    (tmp_path / "s.jsonl").write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in [*rows, {"input": [], "ideal": "x"}, {"input": [{"content": "no tables"}], "ideal": "x"}]
        )
    )
    rejected = RejectedRows()
    (row,) = spider.rows(tmp_path / "s.jsonl", rejected)
    assert [r["reason"] for r in rejected.rows] == [
        "its query cannot be run (no such column: colour)",
        "its query returns nothing on synthetic data",
        "not a question with tables and a gold query",
        "lists no tables",
    ]
    assert (row["id"], row["group"], row["messages"][0]["role"]) == ("spider-1", "singer+song", "user")
    sql = get_score_function("sql")
    assert (
        sql(
            (),
            "```sql\nSELECT song.Title FROM song, singer WHERE singer.Singer_ID = song.Singer_ID AND singer.Name ="
            " 'Ada'\n```",
            row,
        ).value
        == 1.0
    )
    assert sql((), query.replace("SELECT", "select"), row).value == 1.0
    for other in (
        query.replace("'Ada'", "'Ben'"),
        query.replace("JOIN", "LEFT JOIN").replace(" WHERE T1.Name = 'Ada'", ""),
        query.replace("T2.Title", "T1.Name"),
        "SELECT Title FROM song",
    ):
        assert sql((), other, row).value == 0.0


def same_group(rows: list[Row]) -> list[tuple[Row, str]]:
    """Questions with the query of another question about the same tables."""
    found = []
    for row in rows:
        for other in rows:
            if other["group"] == row["group"] and "".join(other["answer"]["sql"].lower().split()) != "".join(
                row["answer"]["sql"].lower().split()
            ):
                found.append((row, other["answer"]["sql"]))
    return found[::7]


def test_the_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected = RejectedRows()
    questions = spider.rows(assets.fetch("spider-sql"), rejected)
    assert (len(questions), len(rejected.rows)) == (194, 0)
    verify = get_score_function("verified")
    assert all(verify((), row["messages"][-1]["content"], row).value == 1.0 for row in questions)
    others = same_group(questions)
    assert len(others) > 100
    assert sum(verify((), query, row).value for row, query in others) < 0.02 * len(others)
    examples = flan_cot.rows(assets.fetch("mmlu-cot"), rejected)
    assert len(examples) == 282
    assert all(verify((), row["messages"][-1]["content"], row).value == 1.0 for row in examples)
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    assert (
        main(
            [
                "data",
                "chat",
                "asset:sarcasm-headlines",
                "--out",
                str(tmp_path / "h"),
                "--set",
                "duplicates=drop",
                "--quiet",
            ]
        )
        == 0
    )
    made = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert made["metrics"]["rows"] + made["metrics"]["rejected"] == 28614
    assert made["about"]["dropped"] == {"duplicate of another row": 116}
