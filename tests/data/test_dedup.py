"""Duplicates are found and only they: hashes against plain Python, MinHash against true Jaccard, labelled edits, and
nothing is lost.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.plain_words import plain_words

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document
from llmworks.data.duplicates.clusters import Clusters, group_equal_values
from llmworks.data.duplicates.near import Near, candidate_probability, hash_bands, jaccard, minhash_signatures
from llmworks.data.text.hashing import TextHashes, hash_shingles, hash_words, unique_hashes

CASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "filter_cases.json.gz").read_bytes()))[
    "rows"
]
NOVELS = [row[1] for row in CASES if len(row[1].split()) > 60]


def test_words_are_numbered_alike_wherever_they_stand() -> None:
    texts = [
        *NOVELS[:60],
        "",
        "   ",
        "Straße STRASSE straße",
        "one",
        "a-b a_b",
        "x" * 3_000_000,
        "tail ends with a word",
        "Tail",
    ]
    known: dict[str, int] = {}
    at = 0
    for column in (
        pa.array(texts),
        pa.chunked_array([texts[:7], texts[7:]]).slice(0),
        pa.array(["skipped", *texts]).slice(1),
    ):
        at = 0
        for hashed in hash_words(column):
            for i in range(len(hashed)):
                words = plain_words(texts[at])
                assert len(hashed[i]) == len(words)
                for word, number in zip(words, hashed[i].tolist(), strict=True):
                    assert known.setdefault(word, number) == number
                at += 1
        assert at == len(texts)
    assert len(set(known.values())) == len(known)


def test_shingles_are_runs_of_words() -> None:
    texts = ["a b c d e f", "a b c d e f a b c d e", "a b", "", "b a", "f e d c b a"]
    (hashed,) = hash_words(pa.array(texts))
    sets = [set(unique_hashes(hash_shingles(hashed, 5))[i].tolist()) for i in range(len(texts))]
    expected = [{tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))} if (w := t.split()) else set() for t in texts]
    assert [len(s) for s in sets] == [len(s) for s in expected]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert len(sets[i] & sets[j]) == len(expected[i] & expected[j]), (i, j)


def edited(text: str, share: float, rng: random.Random) -> str:
    """One word in so many is replaced, taken out, or has another behind it."""
    out: list[str] = []
    for word in text.split():
        kind = rng.random() / share
        out += (
            [word]
            if kind >= 1
            else [rng.choice(NOVELS[0].split())]
            if kind < 1 / 3
            else []
            if kind < 2 / 3
            else [word, "indeed"]
        )
    return " ".join(out)


def sets_of(texts: list[str]) -> TextHashes:
    """The shingle sets of some texts."""
    blocks = [unique_hashes(hash_shingles(block, 5)) for block in hash_words(pa.array(texts))]
    return TextHashes(
        np.concatenate([b.values for b in blocks]),
        np.concatenate(([0], np.cumsum(np.concatenate([b.counts for b in blocks])))),
    )


def test_signatures_estimate_the_true_similarity() -> None:
    rng = random.Random(1)
    pairs = [(text, edited(text, share, rng)) for text in NOVELS[:150] for share in (0.02, 0.1, 0.3)]
    sets = sets_of([t for pair in pairs for t in pair])
    minima = minhash_signatures(sets, 256)
    errors = []
    for i in range(len(pairs)):
        a, b = (set(zip(*(w[k:] for k in range(5)), strict=False)) for w in map(plain_words, pairs[i]))
        true = len(a & b) / len(a | b)
        assert jaccard(sets[2 * i], sets[2 * i + 1]) == pytest.approx(true, abs=1e-9)
        errors.append(float(np.mean(minima[2 * i] == minima[2 * i + 1])) - true)
    assert abs(np.mean(errors)) < 0.01  # one-permutation MinHash is unbiased
    assert np.std(errors) < 2 * (0.25 / 256) ** 0.5


def test_bands_meet_as_often_as_the_formula_says() -> None:
    rng = random.Random(2)
    config = Near(num_perm=128)
    assert (config.rows_per_band, config.num_bands) == (3, 42)
    pairs = [(text, edited(text, 0.1, rng)) for text in NOVELS for _ in range(4)]
    sets = sets_of([t for pair in pairs for t in pair])
    band = hash_bands(minhash_signatures(sets, 128), config.rows_per_band)
    expected = sum(candidate_probability(jaccard(sets[2 * i], sets[2 * i + 1]), 3, 42) for i in range(len(pairs)))
    met = sum(bool((band[:, 2 * i] == band[:, 2 * i + 1]).any()) for i in range(len(pairs)))
    assert met == pytest.approx(expected, rel=0.05)


def test_texts_without_words_are_no_duplicates_of_one_another() -> None:
    (hashed,) = hash_words(pa.array(["...", "???", "a b c d e f", "A, b; c: d e F!"]))
    band = hash_bands(minhash_signatures(unique_hashes(hash_shingles(hashed, 5)), 64), 2)
    assert not band[:, :2].any()
    assert (band[:, 2] == band[:, 3]).all()


def test_clusters() -> None:
    clusters = Clusters(8)
    for a, b in ((5, 3), (3, 7), (1, 2)):
        clusters.join(a, b)
    assert list(clusters.members()) == [[1, 2], [3, 5, 7]]
    assert clusters.count_sizes() == {2: 1, 3: 1}
    assert [g.tolist() for g in group_equal_values(np.array([4, 0, 9, 4, 0, 9, 9, 1], dtype=np.uint64))] == [
        [0, 3],
        [2, 5, 6],
    ]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, str]]:
    """Novels' pieces with exact copies, copies in capitals, and edits of 5 and 10 percent; the label is the piece that
    a text was made from.
    """
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    rng = random.Random(3)
    pieces = distinct(NOVELS)
    rows = [(f"p{i}", text, f"p{i}") for i, text in enumerate(pieces)]
    for i, text in enumerate(pieces):
        kind = i % 5
        if kind < 4:
            copy = (text, text.upper() + " !", edited(text, 0.05, rng), edited(text, 0.1, rng))[kind]
            rows.append((f"{('same', 'words', 'five', 'ten')[kind]}{i}", copy, f"p{i}"))
    rng.shuffle(rows)
    with DocumentWriter(tmp_path / "docs", group_bytes=20_000, shard_bytes=100_000) as writer:
        for id, text, label in rows:
            writer.add(Document(id, text, "novels", {"label": label, "quality": len(id)}))
    return tmp_path / "docs", {id: label for id, _, label in rows}


def distinct(texts: list[str]) -> list[str]:
    """Texts that share hardly any run of five words."""
    kept: list[tuple[str, set[Any]]] = []
    for text in texts:
        words = plain_words(text)
        own = set(zip(*(words[k:] for k in range(5)), strict=False))
        if all(len(own & other) / len(own | other) < 0.02 for _, other in kept):
            kept.append((text, own))
    return [text for text, _ in kept]


def run(*words: str) -> int:
    return main(["data", "dedup", *words, "--quiet"])


def test_labelled_duplicates(corpus: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    path, labels = corpus
    assert run("--data", str(path), "--out", str(tmp_path / "a")) == 0
    kept = list(read_documents(Dataset(tmp_path / "a")))
    dropped = pq.read_table(tmp_path / "a/dropped").to_pylist()
    assert len(kept) + len(dropped) == len(labels)
    assert {d.id for d in kept} | {row["id"] for row in dropped} == set(labels)
    for row in dropped:  # precision
        metadata = json.loads(row["metadata"])
        assert labels[metadata["duplicate_of"]] == labels[row["id"]]
        assert metadata["similarity"] >= 0.35
        assert (row["reason"] == "exact duplicate") == (
            metadata["similarity"] == 1 and row["reason"] != "near-duplicate"
        )
    gone = {row["id"] for row in dropped} | {json.loads(row["metadata"])["duplicate_of"] for row in dropped}
    recall = {
        kind: np.mean([i in gone for i in labels if i.startswith(kind)]) for kind in ("same", "words", "five", "ten")
    }
    assert recall["same"] == recall["words"] == 1
    assert recall["five"] >= 0.95
    assert recall["ten"] >= 0.55
    page = (tmp_path / "a/report/report.html").read_text()
    assert "<mark>" in page
    assert json.loads((tmp_path / "a/manifest.json").read_text())["metrics"]["clusters"] == len(dropped)


@pytest.mark.parametrize("keep", ["longest", "first", "highest"])
def test_which_one_stays(corpus: tuple[Path, dict[str, str]], tmp_path: Path, keep: str) -> None:
    path, _ = corpus
    every = list(read_documents(Dataset(path)))
    assert run("--data", str(path), "--set", f"keep={keep}", "--out", str(tmp_path / "a")) == 0
    place = {d.id: i for i, d in enumerate(every)}
    by_id = {d.id: d for d in every}
    rank = {
        "longest": lambda d: len(d.text.encode()),
        "first": lambda d: -place[d.id],
        "highest": lambda d: d.metadata["quality"],
    }[keep]
    for row in pq.read_table(tmp_path / "a/dropped").to_pylist():
        assert rank(by_id[json.loads(row["metadata"])["duplicate_of"]]) >= rank(by_id[row["id"]])
    kept = [d.id for d in read_documents(Dataset(tmp_path / "a"))]
    assert kept == sorted(kept, key=place.__getitem__)


def test_bytes_and_words(corpus: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    path, _ = corpus
    texts = [d.text for d in read_documents(Dataset(path))]
    for by, key in (("bytes", str), ("words", lambda text: tuple(plain_words(text)))):
        assert (
            run("--data", str(path), "--set", "near=null", "--set", f"exact.match={by}", "--out", str(tmp_path / by))
            == 0
        )
        assert len(pq.read_table(tmp_path / by / "dropped")) == len(texts) - len(set(map(key, texts))) >= 50


def test_repeated_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    menu, rare = "Home | Products | About us | Contact | Imprint", "This line stands in three documents and may stay."
    with DocumentWriter(tmp_path / "docs", group_bytes=2000) as writer:
        for i in range(20):
            body = f"Document {i} has a line of its own, number {i * i}, which nobody shares with it.\nshort\n"
            writer.add(
                Document(str(i), f"{menu}\n{body if i != 7 else ''}{rare if i in (3, 5, 9) else ''}\n  {menu} ", "s")
            )
    words = [
        "--data",
        str(tmp_path / "docs"),
        "--set",
        "exact=null",
        "--set",
        "near=null",
        "--set",
        "lines.max_document_frequency=3",
    ]
    assert run(*words, "--out", str(tmp_path / "a")) == 0
    texts = {d.id: d.text for d in read_documents(Dataset(tmp_path / "a"))}
    assert texts["0"].count(menu) == 2  # where it came first
    assert all(menu not in text for id, text in texts.items() if id != "0")
    assert all(rare in texts[id] and "short" in texts[id] for id in ("3", "5", "9"))
    assert "7" not in texts
    assert [(r["id"], r["reason"]) for r in pq.read_table(tmp_path / "a/dropped").to_pylist()] == [
        ("7", "only repeated lines")
    ]


def test_workers_and_mistakes(
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = corpus
    digests = set()
    for workers in ("1", "2"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / f"ws{workers}"))
        assert (
            run("--data", str(path), "--out", str(tmp_path / workers), "--workers", workers, "--set", "lines={}") == 0
        )
        digests.add(json.loads((tmp_path / workers / "manifest.json").read_text())["digest"])
    assert len(digests) == 1
    capsys.readouterr()
    for setting, says in (
        (["near.num_perm=100"], "must be a power of two"),
        (["exact=null", "near=null"], "set at least one"),
        (["keep=highest", "score_field=stars"], "no numeric 'stars' (score_field) in its metadata"),
    ):
        words = [word for s in setting for word in ("--set", s)]
        assert run("--data", str(path), *words, "--out", str(tmp_path / "bad")) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
