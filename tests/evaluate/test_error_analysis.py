"""Planted failures are found, chance is not taken for one; what is practised is never what is tested."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmworks.cli import main
from llmworks.core.artifact import Artifact, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.data.store.rows import read_chat
from llmworks.evaluate.error_analysis import ErrorAnalysisConfig, error_analysis, fisher_exact_p
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.evaluate.protocol.questions import get_half
from llmworks.evaluate.to_training import ToTrainingConfig, to_training
from llmworks.generate.engines.torch import TorchEngine
from llmworks.runtime.session import load

TOPICS = {
    "ships": "harbour sails anchor captain voyage deck",
    "bread": "flour oven yeast dough loaf crust",
    "stars": "telescope orbit planet comet galaxy moon",
    "law": "judge verdict statute witness appeal court",
}


def test_the_tail_is_that_of_scipy() -> None:
    from scipy.stats import hypergeom

    for seen, drawn, marked, total in ((3, 10, 8, 50), (0, 5, 5, 20), (5, 5, 5, 20), (7, 30, 12, 31), (4, 4, 20, 20)):
        assert fisher_exact_p(seen, drawn, marked, total) == pytest.approx(hypergeom.sf(seen - 1, total, marked, drawn))


def evaluation(tmp_path: Path, fails: Callable[[str, int, random.Random], bool], count: int = 240) -> Report:
    draw = random.Random(0)
    samples = []
    for i in range(count):
        topic = list(TOPICS)[i % 4]
        size = draw.randint(4, 30)
        wrong = fails(topic, size, draw)
        samples.append(
            {
                "id": str(i),
                "group": "",
                "question": " ".join(draw.choices(TOPICS[topic].split(), k=size)),
                "text": "said",
                "reference": "right",
                "finish": "stop",
                "answers": {"": ["said"]},
                "reason": "another number, wanted 4" if wrong else "",
                "score": float(not wrong),
            }
        )
    (tmp_path / "e").mkdir(exist_ok=True)
    (tmp_path / "e" / "report.json").write_text(
        json.dumps({"task": "t", "model": "m", "percent": True, "better": "higher", "samples": samples})
    )
    return Report(tmp_path / "e", name="e")


def context(tmp_path: Path, page: ReportBuilder | None = None, engine: Any = None) -> Context:
    (tmp_path / "out").mkdir(parents=True, exist_ok=True)
    (tmp_path / "scratch").mkdir(exist_ok=True)

    def open_engine(artifact: Artifact) -> Any:
        return engine()

    return Context(
        tmp_path / "out", tmp_path / "scratch", 0, Progress(quiet=True), page or ReportBuilder(), open_engine
    )


def test_a_topic_that_fails_is_found(tmp_path: Path) -> None:
    report, page = (
        evaluation(tmp_path, lambda topic, size, draw: draw.random() < (0.7 if topic == "law" else 0.2)),
        ReportBuilder(),
    )
    made = error_analysis(ErrorAnalysisConfig(n_clusters=4), report, context(tmp_path, page))
    page.write(tmp_path / "out")
    found = [p for p in page.data["parts"] if p["p_of_all"] < 0.05]
    assert [p["facet"] for p in found] == ["topic"]
    assert set(found[0]["name"].split(", ")) <= set(TOPICS["law"].split())
    assert found[0]["samples"] == 60
    assert made.metrics["significant_parts"] == 1
    assert "verdict" in page.subtitle or any(w in page.subtitle for w in TOPICS["law"].split())
    assert page.data["kinds"] == {"another number": page.data["failed"]} or set(
        page.data["kinds"]["another number"]
    ) == set(page.data["failed"])


def test_length_that_fails_is_found(tmp_path: Path) -> None:
    page = ReportBuilder()
    error_analysis(
        ErrorAnalysisConfig(n_clusters=4),
        evaluation(tmp_path, lambda topic, size, draw: draw.random() < (0.8 if size > 24 else 0.2)),
        context(tmp_path, page),
    )
    assert [p["name"].split()[0] for p in page.data["parts"] if p["p_of_all"] < 0.05] == ["above"]


def test_chance_is_not_taken_for_a_cause(tmp_path: Path) -> None:
    found = 0
    for seed in range(12):
        page, draw = ReportBuilder(), random.Random(seed)
        error_analysis(
            ErrorAnalysisConfig(n_clusters=4),
            evaluation(tmp_path, lambda topic, size, _, draw=draw: draw.random() < 0.3),
            context(tmp_path, page),
        )
        found += any(p["p_of_all"] < 0.05 for p in page.data["parts"])
    assert found <= 2


def test_nothing_failed_and_nothing_to_divide(tmp_path: Path) -> None:
    page = ReportBuilder()
    made = error_analysis(ErrorAnalysisConfig(), evaluation(tmp_path, lambda *_: False), context(tmp_path, page))
    assert (made.metrics["failed"], made.metrics["significant_parts"]) == (0, 0)
    page.write(tmp_path / "out")
    (tmp_path / "e" / "report.json").write_text(
        json.dumps(
            {"task": "t", "model": "m", "percent": False, "samples": [{"id": "1", "question": "q", "score": 1.2}]}
        )
    )
    with pytest.raises(DataError, match="no right and wrong answers"):
        error_analysis(ErrorAnalysisConfig(), Report(tmp_path / "e", name="e"), context(tmp_path))

        # practice


TASK: dict[str, Any] = {
    "name": "t",
    "question": "{{q}}",
    "answer": "{{a}}",
    "metrics": ["exact_match"],
    "max_tokens": 4,
}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"q": f"what is {i} in Oslo", "a": str(i), "theme": f"s{i // 4}"} for i in range(count)]


@pytest.fixture
def asked(tmp_path: Path, pico: Path) -> Callable[..., tuple[Report, Dataset, list[str]]]:
    def go(
        fields: dict[str, Any], rows: list[dict[str, Any]], place: str, **config: Any
    ) -> tuple[Report, Dataset, list[str]]:
        task, data, here = tmp_path / f"{place}.yaml", tmp_path / f"{place}.jsonl", tmp_path / place
        task.write_text(yaml.safe_dump(fields))
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        model, dataset = load(str(pico)), load(str(data))
        assert isinstance(model, Model)
        assert isinstance(dataset, Dataset)
        page = ReportBuilder()
        evaluate(
            EvaluateConfig(task=str(task), **config),
            model,
            dataset,
            context(here, page, lambda: TorchEngine.open(pico)),
        )
        page.write(here / "out")
        return Report(here / "out", name=place), dataset, [s["question"] for s in page.data["samples"]]

    return go


def test_sides_are_halves_that_never_meet(asked: Callable[..., tuple[Report, Dataset, list[str]]]) -> None:
    rows = rows_of(80)
    _, _, left = asked(TASK, rows, "a", split_half="dev")
    _, _, right = asked(TASK, list(reversed(rows)), "b", split_half="test")  # in another order
    assert not set(left) & set(right)
    assert len(left) + len(right) == 80
    assert 20 < len(left) < 60
    _, _, again = asked(
        TASK, [{**r, "id": f"other{i}"} for i, r in enumerate(rows)], "c", split_half="dev"
    )  # under other ids
    assert set(again) == set(left)


def test_rows_of_a_group_stay_together() -> None:
    for theme in range(20):
        sides = {get_half({"q": f"q{i}", "theme": theme}, f"s{theme}") for i in range(9)}
        assert len(sides) == 1
    assert get_half({"q": "The  Fox", "id": "1"}, "") == get_half({"id": "2", "q": "the fox"}, "")  # the same words


def test_failed_rows_become_training_rows_and_no_test_row_does(
    tmp_path: Path, asked: Callable[..., tuple[Report, Dataset, list[str]]]
) -> None:
    rows = rows_of(80)
    report, data, questions = asked(TASK, rows, "a", split_half="dev")
    _, _, tested = asked(TASK, rows, "b", split_half="test")
    made = to_training(ToTrainingConfig(), report, data, context(tmp_path / "p"))
    found = read_chat(Dataset(made.path))
    said = {r["messages"][0]["content"]: r["messages"][-1]["content"] for r in found}
    failed = {s["question"] for s in report.read()["samples"] if s["score"] < 1}
    assert set(said) == failed <= set(questions)
    assert not set(said) & set(tested)
    answers = {r["q"]: r["a"] for r in rows}
    assert all(answers[q] == a for q, a in said.items())


def test_only_the_practice_side_is_taken(
    tmp_path: Path, asked: Callable[..., tuple[Report, Dataset, list[str]]]
) -> None:
    for place, side, message in (("a", "all", "evaluates all rows"), ("b", "test", "evaluates the test half")):
        report, data, _ = asked(TASK, rows_of(30), place, split_half=side)
        with pytest.raises(DataError, match=message):
            to_training(ToTrainingConfig(), report, data, context(tmp_path / place / "p"))
    report, _, _ = asked(TASK, rows_of(30), "c", split_half="dev")
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"q": "x", "a": "y", "id": "o"})
        + "\n"
        + "".join(json.dumps({"q": f"z{i}", "a": "y", "id": f"p{i}"}) + "\n" for i in range(9))
    )
    other = load(str(tmp_path / "other.jsonl"))
    assert isinstance(other, Dataset)
    with pytest.raises(DataError, match="is not in its dev half"):
        to_training(ToTrainingConfig(), report, other, context(tmp_path / "q"))


def test_from_the_command_line(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "evaluate",
                str(pico),
                "--set",
                "task=medmcqa",
                "--set",
                "split_half=dev",
                "--set",
                "limit=60",
                "--out",
                "scored",
                "--quiet",
            ]
        )
        == 0
    )
    assert main(["evaluate", "error_analysis", "scored", "--quiet"]) == 0
    assert "clusters" in capsys.readouterr().out
    assert main(["evaluate", "to_training", "scored", "--out", "next", "--quiet"]) == 0
    assert main(["data", "show", "next", "--quiet"]) == 0
