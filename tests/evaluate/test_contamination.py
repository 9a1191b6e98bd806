"""Planted rows are found in training data, shared boilerplate is not taken for one, and the lineage says what a model
was trained on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmworks.core.artifact import Artifact, Dataset, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Message, messages_to_json
from llmworks.data.store.rows import write_chat
from llmworks.evaluate.contamination import ContaminationConfig, contamination
from llmworks.lineage.family import Family, LineageNode


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count))


def run(
    tmp_path: Path, questions: list[str], training: list[str], scores: list[float] | None = None
) -> tuple[Report, dict[str, Any]]:
    samples = [
        {"id": str(i), "question": q, "reference": "yes", "group": "", "score": (scores or [1.0] * len(questions))[i]}
        for i, q in enumerate(questions)
    ]
    (tmp_path / "e").mkdir(exist_ok=True)
    (tmp_path / "e" / "report.json").write_text(json.dumps({"task": "t", "model": "m", "samples": samples}))
    write_chat(
        tmp_path / "chats",
        [
            {
                "id": f"r{i}",
                "group": "",
                "messages": messages_to_json((Message("user", t), Message("assistant", "ok"))),
                "tools": [],
                "answer": None,
                "extra": {},
            }
            for i, t in enumerate(training)
        ],
    )
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir(exist_ok=True)
    page = ReportBuilder()

    def never(artifact: Artifact) -> Any:
        raise AssertionError

    made = contamination(
        ContaminationConfig(),
        Report(tmp_path / "e", name="e"),
        [Dataset(tmp_path / "chats", name="chats")],
        Context(tmp_path / "out", tmp_path / "scratch", 0, Progress(quiet=True), page, never),
    )
    page.write(tmp_path / "out")
    return made, page.data


def test_planted_rows_are_found_and_the_score_is_split(tmp_path: Path) -> None:
    draw = random.Random(0)
    questions = [words(draw, 30) for _ in range(100)]
    training = [words(draw, 200) for _ in range(50)]
    for i in range(
        0, 40, 2
    ):  # a part of every second of the first forty, within other text, in other case and punctuation
        part = " ".join(questions[i].split()[7:22])
        training.append(f"{words(draw, 20)} {part.upper().replace(' ', ', ')} {words(draw, 20)}")
    scores = [1.0 if i < 40 and i % 2 == 0 else 0.5 for i in range(100)]
    made, data = run(tmp_path, questions, training, scores)
    assert set(data["contaminated"]) == {str(i) for i in range(0, 40, 2)}
    assert (made.metrics["score_contaminated"], made.metrics["score_clean"]) == (1.0, 0.5)
    assert (made.metrics["contaminated"], made.metrics["clean"], made.metrics["too_short"]) == (20, 80, 0)


def test_twelve_words_are_not_thirteen(tmp_path: Path) -> None:
    draw = random.Random(1)
    question = words(draw, 30)
    for count, touched in ((12, 0), (13, 1)):
        made, _ = run(
            tmp_path,
            [question, words(draw, 30)],
            [f"{words(draw, 9)} {' '.join(question.split()[3 : 3 + count])} {words(draw, 9)}"],
        )
        assert made.metrics["contaminated"] == touched


def test_the_words_of_the_task_are_no_sign(tmp_path: Path) -> None:
    draw = random.Random(2)
    frame = "choose the right one of the following options and answer with its letter only please"
    made, _ = run(
        tmp_path, [f"{frame} {words(draw, 20)}" for _ in range(60)], [f"{frame} {words(draw, 40)}" for _ in range(20)]
    )
    assert made.metrics["contaminated"] == 0


def test_short_samples_are_compared_whole_or_not_at_all(tmp_path: Path) -> None:
    draw = random.Random(3)
    nine, three = words(draw, 8), words(draw, 3)  # with the reference: nine and four words
    made, data = run(tmp_path, [nine, three, words(draw, 40)], [f"{nine} yes", three])
    assert list(data["contaminated"]) == ["0"]
    assert data["too_short"] == ["1"]
    assert made.metrics["clean"] == 1


def test_what_is_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a task evaluation"):
        run(tmp_path, [], ["x"])


def test_lineage_says_what_a_model_was_trained_on() -> None:
    def node(digest: str, kind: str, stage: str, *parents: tuple[str, str], schema: str = "") -> LineageNode:
        artifact = Dataset(Path(), about={"schema": schema}) if kind == "dataset" else None
        return LineageNode(digest, kind, digest, stage, "exact", parents, artifact)

    nodes = [
        node("raw", "dataset", ""),
        node("chats", "dataset", "data.chat", ("data", "raw"), schema="chat"),
        node("held", "dataset", "data.split", ("data", "raw"), schema="chat"),
        node("docs", "dataset", "data.read", ("data", "raw"), schema="text"),
        node("packed", "dataset", "data.pack", ("data", "docs"), ("tokenizer", "tok"), schema="tokens"),
        node("tok", "tokenizer", ""),
        node("new", "model", "model.new"),
        node("base", "model", "train.pretrain", ("model", "new"), ("data", "packed")),
        node("tuned", "adapter", "train.sft", ("model", "base"), ("data", "chats"), ("held_out", "held")),
        node("merged", "model", "merge.adapter", ("model", "base"), ("adapter", "tuned")),
        node("other", "dataset", ""),
    ]
    family = Family({n.digest: n for n in nodes})
    assert {n.digest for n in family.list_training_data("merged")} == {"docs", "chats"}
    assert {n.digest for n in family.list_training_data("base")} == {"docs"}
    assert family.list_training_data("new") == []
