"""Test rows inside training documents are found by shared words as plain Python finds them, and nothing else is."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.data.plain_words import plain_words

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document

CASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "filter_cases.json.gz").read_bytes()))[
    "rows"
]
COUNT = " ".join(map(str, range(60)))
TEXTS = [
    row[1] + (f" {COUNT}" if i % 5 == 0 else "")
    for i, row in enumerate(row for row in CASES if len(row[1].split()) > 80)
][:120]


def grams(text: str, n: int, numbers: bool = False) -> set[tuple[str, ...]]:
    words = plain_words(text)
    every = set(zip(*(words[i:] for i in range(n)), strict=False))
    return {gram for gram in every if numbers or sum(not word.isdecimal() for word in gram) * 2 > n}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[str]]:
    """Documents, some with a list of numbers; and JSON rows of which some are runs of words from documents, some only
    look like it.
    """
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    with DocumentWriter(tmp_path / "docs", group_bytes=20_000) as writer:
        for i, text in enumerate(TEXTS):
            writer.add(Document(f"d{i}", text, "s"))
    draw = random.Random(0)
    rows = []
    for i in range(60):
        words = draw.choice(TEXTS).split()
        at, size = draw.randrange(len(words) - 40), draw.choice([3, 6, 9, 11, 14, 20, 30])
        piece = words[at : at + size]
        if i % 3 == 0:
            piece = [w for j, w in enumerate(piece) if j % 6]  # broken every six words
        if i % 7 == 0:
            piece = " ".join(map(str, range(i, i + 20))).split() + piece[:12]
        rows.append({"question": " ".join(piece).upper(), "meta": {"answer": ["yes"] if i % 2 else "no"}, "number": i})
    path = tmp_path / "tests.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return (
        tmp_path / "docs",
        path,
        ["\n".join([row["question"], "yes" if i % 2 else "no"]) for i, row in enumerate(rows)],
    )


def run(data: Path, tests: Path, out: Path, *words: str) -> int:
    return main(
        ["data", "decontaminate", "--data", str(data), "--tests", f"quiz={tests}", "--out", str(out), "--quiet", *words]
    )


@pytest.mark.parametrize(("n", "numbers"), [(13, False), (8, False), (13, True)])
def test_overlaps_are_those_of_plain_python(
    inputs: tuple[Path, Path, list[str]], tmp_path: Path, n: int, numbers: bool
) -> None:
    data, tests, rows = inputs
    assert (
        run(
            data,
            tests,
            tmp_path / "a",
            "--set",
            f"ngram={n}",
            "--set",
            "near=null",
            "--set",
            f"include_numeric_ngrams={str(numbers).lower()}",
        )
        == 0
    )
    found = {
        (r["row"], r["document"], r["share"])
        for r in map(json.loads, (tmp_path / "a/overlaps.jsonl").read_text().splitlines())
    }
    expected = set()
    for i, row in enumerate(rows, 1):
        size = n if len(plain_words(row)) >= n else 8
        own = grams(row, size, numbers)
        for j, text in enumerate(TEXTS):
            if common := own & grams(text, size, numbers):
                expected.add((f"tests.jsonl#{i}", f"d{j}", round(len(common) / len(own), 4)))
    assert found == expected
    assert len(found) > 10
    gone = {document for _, document, _ in found}
    assert numbers == ({f"d{i}" for i in range(0, len(TEXTS), 5)} <= gone)
    assert {d.id for d in read_documents(Dataset(tmp_path / "a"))} == {f"d{i}" for i in range(len(TEXTS))} - gone
    assert {r["id"] for r in pq.read_table(tmp_path / "a/dropped").to_pylist()} == gone
    for r in map(json.loads, (tmp_path / "a/overlaps.jsonl").read_text().splitlines()):
        assert " ".join(plain_words(r["text"])) in " ".join(plain_words(rows[int(r["row"].partition("#")[2]) - 1]))


def test_near_duplicates_of_whole_rows(inputs: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    data, tests, _ = inputs
    broken = " ".join(w for i, w in enumerate(TEXTS[5].split()) if i % 12)  # no 13 words in a row are left
    tests.write_text(json.dumps({"text": broken}))
    assert run(data, tests, tmp_path / "a", "--set", "near.threshold=0.3", "--set", "action=flag") == 0
    every = list(read_documents(Dataset(tmp_path / "a")))
    assert len(every) == len(TEXTS)
    flagged = {d.id for d in every if "contaminated_by" in d.metadata}
    own = grams(broken, 5, True)
    same = {
        f"d{i}"
        for i, text in enumerate(TEXTS)
        if len(grams(text, 5, True) & own) / len(grams(text, 5, True) | own) >= 0.3
    }
    assert "d5" in flagged <= same


def test_conversations_and_documents_are_test_sets_too(inputs: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    data, tests, _ = inputs
    raw = tmp_path / "chats.jsonl"
    raw.write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "What follows?"},
                    {"role": "assistant", "content": TEXTS[3][:300]},
                ]
            }
        )
    )
    assert main(["data", "chat", "--data", str(raw), "--out", str(tmp_path / "chat"), "--quiet"]) == 0
    assert (
        run(
            data,
            tests,
            tmp_path / "a",
            "--tests",
            f"chat={tmp_path / 'chat'}",
            "--tests",
            f"docs={data}",
            "--set",
            "action=flag",
        )
        == 0
    )
    report = json.loads((tmp_path / "a/report/report.json").read_text())
    assert report["touched"]["chat"] == 1
    assert report["test_rows"] == {"quiz": 60, "chat": 1, "docs": len(TEXTS)}
    assert report["touched"]["docs"] == len(TEXTS)


def test_mistakes(inputs: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, tests, _ = inputs
    for setting, says in (
        ("short_ngram=20", "short_ngram must not be larger"),
        ("action=remove", "Input should be 'drop' or 'flag'"),
    ):
        assert run(data, tests, tmp_path / "a", "--set", setting) == 2
        assert says in capsys.readouterr().err
    assert run(data, data, tmp_path / "a") == 2
    assert "no document is left" in capsys.readouterr().err
    tests.write_text("")
    assert run(data, tests, tmp_path / "a") == 2
    assert "has no rows to compare" in capsys.readouterr().err
    tests.write_text("{broken")
    assert run(data, tests, tmp_path / "a") == 2
    assert "not JSON" in capsys.readouterr().err


def test_workers_change_nothing(
    inputs: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, tests, _ = inputs
    digests = set()
    for workers in ("1", "2"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / f"ws{workers}"))
        assert run(data, tests, tmp_path / workers, "--workers", workers) == 0
        digests.add(json.loads((tmp_path / workers / "manifest.json").read_text())["digest"])
    assert len(digests) == 1
