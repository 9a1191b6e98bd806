"""Mixtures have the shares that were asked for, splits keep groups whole and strata even, and cards tell the
whole way.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document
from llmworks.data.mix import MixConfig, plan_shares


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three sets: 400 documents of 100 characters, 100 of 200, 20 of 50."""
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    for name, count, size in (("web", 400, 100), ("books", 100, 200), ("notes", 20, 50)):
        with DocumentWriter(tmp_path / name, group_bytes=5000) as writer:
            for i in range(count):
                text = f"{name} {i} ".ljust(size, "abcdefghij"[i % 10])
                writer.add(
                    Document(
                        str(i),
                        text,
                        f"{name}-{i // 4}.txt",
                        {"language": "en" if i % 4 else "de", "author": f"a{i % 7}"},
                    )
                )
    return {name: tmp_path / name for name in ("web", "books", "notes")}


def mix(sets: dict[str, Path], out: Path, *settings: str, workers: str = "1") -> int:
    inputs = [word for name, path in sets.items() for word in ("--data", f"{name}={path}")]
    return main(
        [
            "data",
            "mix",
            *inputs,
            "--out",
            str(out),
            "--quiet",
            "--workers",
            workers,
            *(w for s in settings for w in ("--set", s)),
        ]
    )


def test_everything_once_in_another_order(sets: dict[str, Path], tmp_path: Path) -> None:
    assert mix(sets, tmp_path / "a") == 0
    ids = [d.id for d in read_documents(Dataset(tmp_path / "a"))]
    assert sorted(ids) == sorted(f"{name}/{d.id}" for name, path in sets.items() for d in read_documents(Dataset(path)))
    names = [i.partition("/")[0] for i in ids]
    assert sum(a != b for a, b in pairwise(names)) > 100  # not one after the other
    assert mix(sets, tmp_path / "b", "seed=1") == 0
    assert ids != [d.id for d in read_documents(Dataset(tmp_path / "b"))]


def test_weights_and_caps(sets: dict[str, Path], tmp_path: Path) -> None:
    # 61,000 characters are there; half of them books (20,000: 1.525 times), a quarter web (40,000: 0.381), a quarter
    # notes (1,000: capped at 4)
    assert mix(sets, tmp_path / "a", "weights={books: 2, web: 1, notes: 1}") == 0
    found = list(read_documents(Dataset(tmp_path / "a")))
    taken = Counter[str]()
    for document in found:
        taken[document.metadata["mix"]] += len(document.text)
    assert taken["books"] == pytest.approx(30_500, rel=0.01)
    assert taken["web"] == pytest.approx(15_250, rel=0.01)
    assert taken["notes"] == 4000
    times = Counter(d.id.partition("~")[0] for d in found)
    assert {times[f"notes/{i}"] for i in range(20)} == {4}
    assert {times[f"books/{i}"] for i in range(100)} == {1, 2}
    assert len({d.id for d in found}) == len(found)
    report = json.loads((tmp_path / "a/report/report.json").read_text())
    assert report["notes"]["repeats"] == 4


def test_plan_by_hand() -> None:
    shares = plan_shares(MixConfig(weights={"a": 3, "b": 1}, total_characters=800), {"a": 300, "b": 1000, "c": 50})
    assert [(s.name, s.target, s.repeats) for s in shares] == [("a", 600, 2.0), ("b", 200, 0.2), ("c", 0, 0.0)]


def test_the_same_from_any_number_of_workers(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for workers in ("1", "2"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / f"ws{workers}"))
        assert mix(sets, tmp_path / workers, "weights={books: 2, web: 1}", workers=workers) == 0
        digests.add(json.loads((tmp_path / workers / "manifest.json").read_text())["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("weights={boks: 1}", "unknown input 'boks'"),
        ("weights={web: 0}", "not all zero"),
        ("weights={web: -1, books: 2}", "must not be negative"),
    ],
)
def test_mistakes(
    sets: dict[str, Path], tmp_path: Path, setting: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mix(sets, tmp_path / "a", setting) == 2
    assert says in capsys.readouterr().err


def split(data: Path, out: Path, *settings: str) -> int:
    return main(
        [
            "data",
            "split",
            "--data",
            str(data),
            "--out",
            str(out),
            "--quiet",
            *(w for s in settings for w in ("--set", s)),
        ]
    )


@pytest.mark.parametrize("group", ["source", "author", "id"])
def test_no_group_is_in_two_splits(sets: dict[str, Path], tmp_path: Path, group: str) -> None:
    sides = {}
    for part in ("train", "test"):
        assert split(sets["web"], tmp_path / part, f"split={part}", "n_splits=5", f"group_by={group}") == 0
        sides[part] = list(read_documents(Dataset(tmp_path / part)))
    assert len(sides["train"]) + len(sides["test"]) == 400
    key = (
        (lambda d: d.source)
        if group == "source"
        else (lambda d: d.id)
        if group == "id"
        else (lambda d: d.metadata["author"])
    )
    assert not {key(d) for d in sides["train"]} & {key(d) for d in sides["test"]}
    if group != "author":
        assert len(sides["test"]) == 80
    order = [int(d.id) for d in sides["train"]]
    assert order == sorted(order)


def test_folds_hold_everything_once_and_strata_evenly(sets: dict[str, Path], tmp_path: Path) -> None:
    seen = Counter[str]()
    for fold in range(4):
        assert (
            split(sets["web"], tmp_path / str(fold), "split=test", "n_splits=4", f"fold={fold}", "stratify_by=language")
            == 0
        )
        documents = list(read_documents(Dataset(tmp_path / str(fold))))
        assert Counter(d.metadata["language"] for d in documents) == {"en": 75, "de": 25}
        seen.update(d.id for d in documents)
    assert set(seen.values()) == {1}
    assert len(seen) == 400


def test_split_mistakes(sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split(sets["web"], tmp_path / "a", "split=test", "stratify_by=topic") == 2
    assert "has no 'topic' in its metadata (it has " in capsys.readouterr().err
    assert split(sets["notes"], tmp_path / "a", "split=test", "n_splits=500", "fold=400") == 2
    assert "is empty; 20 groups are too few" in capsys.readouterr().err


def test_the_card_tells_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "raw").mkdir()
    sentence = "The harbour lies at the mouth of the river, and the ships of the town have waited there for the tide."
    for i in range(12):
        lines = [f"{sentence[:-1]} in the year {97 * j}, as it is told." for j in range(1, 12)] + [
            f"This is copy {i} of a text."
        ]
        (tmp_path / "raw" / f"{i}.txt").write_text("\n".join(lines) if i % 3 else "too short | to stay")
    assert main(["data", "read", "--data", str(tmp_path / "raw"), "--out", str(tmp_path / "read"), "--quiet"]) == 0
    lenient = ["--set", "gopher_repetition=null", "--set", "fineweb=null", "--quiet"]
    assert main(["data", "clean", "--data", str(tmp_path / "read"), "--out", str(tmp_path / "clean"), *lenient]) == 0
    assert main(["data", "dedup", "--data", str(tmp_path / "clean"), "--out", str(tmp_path / "dedup"), "--quiet"]) == 0
    assert main(
        [
            "data",
            "split",
            "--data",
            str(tmp_path / "dedup"),
            "--set",
            "split=train",
            "--set",
            "n_splits=2",
            "--out",
            str(tmp_path / "train"),
            "--quiet",
        ]
    ) in (0, 2)
    card = (tmp_path / "dedup/README.md").read_text()
    for words in (
        "| raw | not stated | external files |",
        "| data.read | raw | 12 | 0 |",
        "| data.clean | raw | 8 | 4 | gopher: too few words 4 |",
        "| data.dedup | raw | 1 | 7 | near-duplicate 7 |",
    ):
        assert words in card
    assert "Near-duplicate rate before deduplication: 87.50%." in card
    assert "| en | 1 |" in card
    assert sentence[:60] in card
    about = json.loads((tmp_path / "dedup/manifest.json").read_text())["about"]
    assert [entry["stage"] for entry in about["history"]] == ["data.read", "data.clean", "data.dedup"]


def test_copies_stay_on_one_side(sets: dict[str, Path], tmp_path: Path) -> None:
    assert mix(sets, tmp_path / "m", "total_characters=150000", "max_repeats=4") == 0
    sides = []
    for part in ("train", "test"):
        assert (
            main(
                [
                    "data",
                    "split",
                    "--data",
                    str(tmp_path / "m"),
                    "--out",
                    str(tmp_path / part),
                    "--quiet",
                    "--set",
                    f"split={part}",
                    "--set",
                    "n_splits=4",
                ]
            )
            == 0
        )
        sides.append({d.text for d in read_documents(Dataset(tmp_path / part))})
    assert sum(len(side) for side in sides) == 520
    assert not sides[0] & sides[1]
