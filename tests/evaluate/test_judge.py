"""Judges with planted habits: the report finds each. Kappa against scikit-learn."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmworks.core.artifact import Artifact, Dataset, Manifest, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, LlmworksError, RequestError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Request
from llmworks.evaluate.judge import JudgeConfig, judge
from llmworks.evaluate.statistics import agreement
from llmworks.runtime.session import load


def test_kappa_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    draw = random.Random(0)
    for _ in range(20):
        a = draw.choices("ABC", k=40)
        b = [x if draw.random() < 0.6 else draw.choice("ABC") for x in a]
        assert agreement.kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
        one, other = [draw.randint(1, 6) for _ in range(40)], [draw.randint(1, 6) for _ in range(40)]
        assert agreement.weighted_kappa(one, other) == pytest.approx(cohen_kappa_score(one, other, weights="quadratic"))


def test_votes() -> None:
    assert [
        agreement.merge_verdicts("A", "A"),
        agreement.merge_verdicts("A", "B"),
        agreement.merge_verdicts("C", "C"),
    ] == ["A", "C", "C"]
    assert [agreement.majority_vote(list(v)) for v in ("AAB", "AB", "ABC", "B", "CCA")] == ["A", "C", "C", "B", "C"]


class Scripted:
    """An engine whose answers are a function of the prompt."""

    can = frozenset[str]()

    def __init__(self, name: str, answer: Callable[[str], str]) -> None:
        self.name, self.answer, self.asked = name, answer, 0

    def each(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion | LlmworksError]]:
        for place, request in enumerate(requests):
            self.asked += 1
            said = self.answer(request.messages[-1].content)
            yield place, RequestError("refused") if said == "refuse" else Completion(said, "stop", completion_tokens=1)

    def close(self) -> None:
        pass


def sides(prompt: str) -> tuple[str, str]:
    found = re.findall(r"\[Answer [AB] begins\]\n(.*?)\n\[Answer", prompt, re.DOTALL)
    return found[0], found[1]


def graded(prompt: str) -> str:
    return re.findall(r"\[The answer begins\]\n(.*?)\n\[The answer", prompt, re.DOTALL)[0]


def good(prompt: str) -> str:
    """Sees quality: the number of exclamation marks."""
    a, b = (s.count("!") for s in sides(prompt))
    return f"So. [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def longest(prompt: str) -> str:
    a, b = map(len, sides(prompt))
    return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"


HABITS: dict[str, Callable[[str], str]] = {
    "good": good,
    "first": lambda p: "[[A]]",
    "longest": longest,
    "silent": lambda p: "I cannot say.",
    "refusing": lambda p: "refuse",
    "grader": lambda p: f"Fine. [[{min(10, 1 + graded(p).count('!'))}]]",
    "grades eleven": lambda p: "[[11]]",
}


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    draw = random.Random(0)
    questions = [f"question {i}" for i in range(40)]
    quality = {name: [draw.randint(0, 4) for _ in questions] for name in ("x", "y")}
    reports = {}
    for name, marks in quality.items():
        folder = tmp_path / name
        folder.mkdir()
        samples = [
            {
                "id": str(i),
                "question": q,
                "text": f"answer {'!' * m}{' more words' * draw.randint(0, 5)}",
                "reference": "right",
                "group": "",
                "score": 1.0,
            }
            for i, (q, m) in enumerate(zip(questions, marks, strict=True))
        ]
        (folder / "report.json").write_text(json.dumps({"task": "t", "samples": samples}))
        reports[name] = Report(folder, name=name, about={"model": f"digest-{name}"})
    return {"reports": reports, "quality": quality}


def fake(name: str, digest: str = "") -> Model:
    manifest = Manifest(
        kind="model",
        digest=digest or f"digest-{name}",
        key="",
        stage="",
        revision=0,
        derivation="declared",
        config={},
        parents=[],
        files={},
        about={"format": "http"},
    )
    return Model(Path(), manifest=manifest, name=name, ref="http://h/v1#m")


def ask(
    tmp_path: Path,
    world: dict[str, Any],
    judges: dict[str, str],
    pairs: bool = True,
    labels: Dataset | None = None,
    digests: dict[str, str] | None = None,
    place: str = "run",
    **config: Any,
) -> tuple[Report, dict[str, Any], dict[str, Scripted]]:
    out, scratch, page = tmp_path / place / "out", tmp_path / place / "scratch", ReportBuilder()
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    engines = {name: Scripted(name, HABITS[habit]) for name, habit in judges.items()}

    def open_engine(artifact: Artifact) -> Any:
        return engines[artifact.name]

    models = {name: fake(name, (digests or {}).get(name, "")) for name in judges}
    made = judge(
        JudgeConfig(**config),
        world["reports"]["x"],
        models,
        Context(out, scratch, 0, Progress(quiet=True), page, open_engine),
        world["reports"]["y"] if pairs else None,
        labels,
    )
    page.write(out)
    tables = {
        b.heading: [dict(zip(b.columns, row, strict=True)) for row in b.rows] for b in page.blocks if b.kind == "table"
    }
    return made, tables, engines


def test_a_good_judge_says_what_is_so(tmp_path: Path, world: dict[str, Any]) -> None:
    made, tables, engines = ask(tmp_path, world, {"j": "good"})
    x, y = world["quality"]["x"], world["quality"]["y"]
    wins = sum(a > b for a, b in zip(x, y, strict=True)), sum(a < b for a, b in zip(x, y, strict=True))
    assert (made.metrics["wins"], made.metrics["losses"], made.metrics["ties"]) == (*wins, 40 - sum(wins))
    assert made.metrics["score"] == pytest.approx((wins[0] + (40 - sum(wins)) / 2) / 40)
    assert tables["Judge biases"][0]["consistent in both orders"] == "100%"
    assert engines["j"].asked == 80  # both orders


def test_a_judge_that_prefers_the_first_decides_nothing(tmp_path: Path, world: dict[str, Any]) -> None:
    made, tables, _ = ask(tmp_path, world, {"j": "first"})
    assert (made.metrics["score"], made.metrics["ties"]) == (0.5, 40)
    assert (
        tables["Judge biases"][0]["prefers first"],
        tables["Judge biases"][0]["consistent in both orders"],
    ) == ("100%", "0%")


def test_a_judge_that_prefers_the_longer_is_seen(tmp_path: Path, world: dict[str, Any]) -> None:
    _, tables, _ = ask(tmp_path, world, {"good": "good", "long": "longest"})
    by = {row["judge"]: row for row in tables["Judge biases"]}
    assert by["long"]["longer wins"].startswith("100%")
    assert int(by["good"]["longer wins"].split("%")[0]) < 90
    (pair,) = tables["Inter-judge agreement"]
    assert float(pair["kappa"]) < 0.6


def test_a_jury_decides_by_majority(tmp_path: Path, world: dict[str, Any]) -> None:
    alone, _, _ = ask(tmp_path, world, {"g": "good"}, place="a")
    made, _, _ = ask(tmp_path, world, {"g1": "good", "g2": "good", "f": "first"}, place="b")
    assert made.metrics["score"] == alone.metrics["score"]


def test_kinship_is_told(tmp_path: Path, world: dict[str, Any]) -> None:
    _, tables, _ = ask(tmp_path, world, {"kin": "good", "other": "first"}, digests={"kin": "digest-x"})
    by = {row["judge"]: row["self-preference"] for row in tables["Judge biases"]}
    assert re.fullmatch(r"\d+% for its own answers; other judges 50%", by["kin"])
    assert by["other"] == "–"


def test_grades_and_people(tmp_path: Path, world: dict[str, Any]) -> None:
    (tmp_path / "labels.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "label": 1 + q, "rater": r}) + "\n"
            for i, q in enumerate(world["quality"]["x"][:30])
            for r in ("ann", "ben")
        )
    )
    labels = load(str(tmp_path / "labels.jsonl"))
    assert isinstance(labels, Dataset)
    made, tables, _ = ask(tmp_path, world, {"j": "grader"}, pairs=False, labels=labels)
    assert made.metrics["score"] == pytest.approx(sum(world["quality"]["x"]) / 40 / 9)
    assert made.metrics["kappa"] == pytest.approx(1.0)
    assert made.metrics["num_labeled"] == 30
    assert tables["Agreement with human labels"][0]["95% interval"] == "100.0% to 100.0%"


def test_people_who_disagree_with_a_judge(tmp_path: Path, world: dict[str, Any]) -> None:
    x, y = world["quality"]["x"], world["quality"]["y"]
    right = ["A" if a > b else "B" if b > a else "tie" for a, b in zip(x, y, strict=True)]
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "label": v}) + "\n" for i, v in enumerate(right))
    )
    labels = load(str(tmp_path / "labels.jsonl"))
    assert isinstance(labels, Dataset)
    good_one, _, _ = ask(tmp_path, world, {"j": "good"}, labels=labels, place="a")
    long_one, _, _ = ask(tmp_path, world, {"j": "longest"}, labels=labels, place="b")
    assert good_one.metrics["kappa"] == pytest.approx(1.0)
    assert long_one.metrics["kappa"] < 0.5


def test_a_judge_without_verdicts(tmp_path: Path, world: dict[str, Any]) -> None:
    for habit in ("silent", "refusing", "grades eleven"):
        with pytest.raises(DataError, match="no judge gave a verdict; the first response"):
            ask(tmp_path, world, {"j": habit}, pairs=False, place=habit)
    made, _, _ = ask(tmp_path, world, {"s": "silent", "g": "good"}, place="both")
    assert (made.metrics["unparsed"], made.metrics["num_judged"]) == (40, 40)


BAD = {
    "two labels": (
        [{"id": "1", "label": "A"}, {"id": "1", "label": "B"}],
        "there are two labels for the sample '1'; name the `rater`",
    ),
    "one rater twice": (
        [{"id": "1", "label": "A", "rater": "ann"}, {"id": "1", "label": "A", "rater": "ann"}],
        "'ann' labels the sample '1' twice",
    ),
    "an unknown sample": ([{"id": "99", "label": "A"}], "the id '99' is not a sample"),
    "another label": ([{"id": "1", "label": "left"}], "the label 'left' must be A, B or C"),
}


@pytest.mark.parametrize("what", BAD)
def test_labels_that_cannot_be_used(what: str, tmp_path: Path, world: dict[str, Any]) -> None:
    rows, message = BAD[what]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = load(str(tmp_path / "labels.jsonl"))
    assert isinstance(labels, Dataset)
    with pytest.raises(DataError, match=message):
        ask(tmp_path, world, {"j": "good"}, labels=labels)


def test_a_killed_judging_asks_nothing_twice(
    tmp_path: Path, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [0]

    def breaks(prompt: str) -> str:
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        return good(prompt)

    monkeypatch.setitem(HABITS, "breaks", breaks)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, world, {"j": "breaks"})
    _, _, engines = ask(tmp_path, world, {"j": "good"})
    assert engines["j"].asked == 80 - 29


def test_a_reward_model_is_a_judge(tmp_path: Path, world: dict[str, Any], pico: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from llmworks.core.types import Message
    from llmworks.evaluate.statistics.reward_judge import RewardJudge, is_reward_model
    from llmworks.tokenize.load import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(pico)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    load_tokenizer(pico).save_pretrained(tmp_path / "reward")
    model = load(str(tmp_path / "reward"))
    assert isinstance(model, Model)
    assert is_reward_model(model)
    reward = RewardJudge(model.path)
    (tmp_path / "run" / "out").mkdir(parents=True)
    (tmp_path / "run" / "scratch").mkdir()
    page = ReportBuilder()

    def never(artifact: Artifact) -> Any:
        raise AssertionError

    made = judge(
        JudgeConfig(),
        world["reports"]["x"],
        {"r": model},
        Context(tmp_path / "run" / "out", tmp_path / "run" / "scratch", 0, Progress(quiet=True), page, never),
        world["reports"]["y"],
    )
    texts = [[s["text"] for s in world["reports"][name].read()["samples"]] for name in ("x", "y")]
    better = sum(
        reward.score((Message("user", f"question {i}"),), a) > reward.score((Message("user", f"question {i}"),), b)
        for i, (a, b) in enumerate(zip(*texts, strict=True))
    )
    assert made.metrics["wins"] == better


def test_what_cannot_be_judged(tmp_path: Path, world: dict[str, Any]) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "report.json").write_text(
        json.dumps({"samples": [{"id": "1", "question": "q", "text": "", "logprobs": [1.0]}]})
    )
    world["reports"]["x"] = Report(tmp_path / "z", name="z")
    with pytest.raises(DataError, match="has no generated answers"):
        ask(tmp_path, world, {"j": "good"}, pairs=False)
