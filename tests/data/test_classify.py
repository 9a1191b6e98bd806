"""The classifier tells what its examples differ in, measures itself honestly, and keeps what its bound says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document
from llmworks.data.text.features import BITS, hash_features

GOOD = [
    "the",
    "committee",
    "published",
    "a",
    "careful",
    "report",
    "on",
    "the",
    "harbour",
    "and",
    "its",
    "history",
    "which",
    "explains",
    "how",
    "tides",
    "shaped",
    "the",
    "town",
]
BAD = [
    "click",
    "buy",
    "cheap",
    "now",
    "free",
    "offer",
    "best",
    "price",
    "discount",
    "sale",
    "deal",
    "win",
    "cash",
    "bonus",
    "casino",
    "order",
    "today",
    "limited",
    "pills",
]
COMMON = ["and", "a", "of", "in", "to", "it", "is", "for", "on", "with", "as", "by", "at", "from"]


def make(path: Path, kinds: str, seed: int) -> Path:
    draw = random.Random(seed)
    with DocumentWriter(path, group_bytes=20_000) as writer:
        for i, kind in enumerate(kinds):
            words = [
                draw.choice(COMMON if draw.random() < 0.5 else GOOD if (kind == "g") != (draw.random() < 0.15) else BAD)
                for _ in range(80)
            ]
            writer.add(Document(f"{kind}{i}", " ".join(words), "s"))
    return path


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    good, bad, data = (
        make(tmp_path / "good", "g" * 300, 1),
        make(tmp_path / "bad", "b" * 200, 2),
        make(tmp_path / "data", "gb" * 200, 3),
    )
    return [
        "data",
        "classify",
        "--good",
        str(good),
        "--bad",
        str(bad),
        "--data",
        str(data),
        "--quiet",
        "--out",
        str(tmp_path / "out"),
    ]


def test_features_are_words_and_pairs() -> None:
    texts = ["a b a", "b a", "", "a A  a!"]
    matrix = hash_features(pa.array(texts))
    assert matrix.shape == (4, 1 << BITS)
    assert [matrix[i].nnz for i in range(4)] == [4, 3, 0, 2]  # a, b, ab, ba | b, a, ba | | a, aa
    np.testing.assert_allclose(np.sqrt(matrix.multiply(matrix).sum(axis=1)).A1, [1, 1, 0, 1], rtol=1e-6)
    # by hand: a has sqrt(2), b, "a b" and "b a" have 1, so the length is sqrt(5); the second text has three ones
    assert (matrix[0] @ matrix[1].T).toarray()[0, 0] == pytest.approx((2**0.5 + 1 + 1) / (5**0.5 * 3**0.5), rel=1e-5)


def test_it_learns_and_keeps(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--set", "threshold=0.5"]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["metrics"]["auc"] > 0.99
    kept = list(read_documents(Dataset(tmp_path / "out")))
    dropped = pq.read_table(tmp_path / "out/dropped").to_pylist()
    assert len(kept) + len(dropped) == 400
    assert sum(d.id.startswith("g") for d in kept) / len(kept) > 0.97
    assert all(d.metadata["quality"] >= 0.5 for d in kept)
    page = (tmp_path / "out/report/report.md").read_text()
    assert "casino" in page
    assert "harbour" in page


def test_examples_that_tell_nothing_are_seen(words: list[str], tmp_path: Path) -> None:
    same = make(tmp_path / "same", "g" * 300, 9)
    words[words.index("--bad") + 1] = str(same)
    assert main(words) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["metrics"]["auc"] == pytest.approx(0.5, abs=0.1)
    assert len(list(read_documents(Dataset(tmp_path / "out")))) == 400  # no bound, nothing dropped


def test_quantile_and_workers(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for workers in ("1", "2"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / f"ws{workers}"))
        assert main([*words[:-1], str(tmp_path / workers), "--set", "quantile=0.25", "--workers", workers]) == 0
        manifest = json.loads((tmp_path / workers / "manifest.json").read_text())
        assert manifest["metrics"]["dropped"] == 100
        digests.add(json.dumps({k: v["sha256"] for k, v in manifest["files"].items()}))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["threshold=0.5", "quantile=0.5"], "mutually exclusive"),
        (["threshold=1"], "no document scores 1 or more"),
        (["max_examples=3"], "greater than or equal to 20"),
    ],
)
def test_mistakes(words: list[str], settings: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *(w for s in settings for w in ("--set", s))]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_too_few_examples(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words[words.index("--bad") + 1] = str(make(tmp_path / "few", "b" * 4, 9))
    assert main(words) == 2
    assert "bad: 4 examples are too few" in capsys.readouterr().err
