"""The stage keeps, mends and drops: nothing is lost, everything has a reason, and the number of workers changes
nothing.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document

CASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "filter_cases.json.gz").read_bytes()))[
    "rows"
]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    with DocumentWriter(tmp_path / "docs", group_bytes=60_000, shard_bytes=150_000) as writer:
        for number, row in enumerate(CASES):
            writer.add(Document(row[0], row[1], "cases", {"n": number}))
        writer.add(Document("german", "Die Schiffe warteten an der Mündung des Flusses auf die Flut. " * 20, "cases"))
        writer.add(Document("broken", "It wasnâ€™t clear why the cafÃ© was closed. " * 3, "cases"))
    return tmp_path / "docs"


def run(*words: str) -> int:
    return main(["data", "clean", *words, "--quiet"])


def test_nothing_is_lost(corpus: Path, tmp_path: Path) -> None:
    assert run("--data", str(corpus), "--out", str(tmp_path / "a")) == 0
    kept = {d.id: d for d in read_documents(Dataset(tmp_path / "a"))}
    dropped = pq.read_table(tmp_path / "a/dropped").to_pylist()
    assert len(kept) + len(dropped) == len(CASES) + 2
    assert set(kept) | {row["id"] for row in dropped} == {row[0] for row in CASES} | {"german", "broken"}
    assert all(row["reason"] for row in dropped)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert sum(manifest["about"]["dropped"].values()) == len(dropped)
    assert all(d.metadata["language"] for d in kept.values())
    assert {row["id"]: row["reason"] for row in dropped}["broken"] == "gopher: one 3-gram repeated"
    assert "It wasn't clear why the café" in next(row["text"] for row in dropped if row["id"] == "broken").replace(
        "’", "'"
    )
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "a/report" / name).stat().st_size > 500


def test_only_english_and_no_rules(corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "clean.yaml"
    config.write_text(
        "repair: null\ngopher_quality: null\ngopher_repetition: null\nc4: null\nfineweb: null\nlanguage: {languages:"
        " [de]}\n"
    )
    assert run("--data", str(corpus), "--config", str(config), "--out", str(tmp_path / "a")) == 0
    assert [d.id for d in read_documents(Dataset(tmp_path / "a"))] == ["german"]
    reasons = json.loads((tmp_path / "a/manifest.json").read_text())["about"]["dropped"]
    assert reasons["language: en"] > 300


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("language.languages=[english]", "unknown language code 'english'; known are ISO 639 codes such as en"),
        ("gopher_quality.min_doc_words=-1", "greater than or equal to 0"),
        ("gopher.min_words=5", "did you mean"),
        ("gopher_quality.min_doc_words=90000", "all 402 documents were dropped"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, setting: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", str(corpus), "--set", setting, "--out", str(tmp_path / "a")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_workers_change_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for workers in ("1", "2"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / f"ws{workers}"))
        assert run("--data", str(corpus), "--out", str(tmp_path / workers), "--workers", workers) == 0
        digests.append(json.loads((tmp_path / workers / "manifest.json").read_text())["digest"])
    assert digests[0] == digests[1]
