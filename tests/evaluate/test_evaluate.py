"""Evaluation asks every row once, keeps answers over a kill, and compares only what can be paired."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmworks.core.artifact import Artifact, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, EngineError, LlmworksError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Delta, Request
from llmworks.data.store.rows import flatten_messages, read_chat, write_chat
from llmworks.evaluate.compare import CompareEvaluationsConfig, compare
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.runtime.session import load


class Parrot:
    """An engine that gives the reference answer to some questions, and breaks when told to."""

    name = "parrot"
    can = frozenset[str]()

    def __init__(self, answers: dict[str, str], break_after: int = 10**9) -> None:
        self.answers, self.break_after = answers, break_after
        self.asked: list[str] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        raise NotImplementedError

    def each(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion | LlmworksError]]:
        for place, request in reversed(list(enumerate(requests))):  # in no particular order
            if len(self.asked) >= self.break_after:
                yield place, EngineError("gone")
                continue
            self.asked.append(request.messages[-1].content)
            yield place, Completion(self.answers.get(request.messages[-1].content, "?"), "stop", completion_tokens=1)

    def stream(self, request: Request) -> Iterator[Delta]:
        return iter(())

    def score(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return []

    def logits(self, ids: Sequence[int]) -> Any:
        return None

    def close(self) -> None:
        pass


def context(tmp_path: Path, name: str, engine: Parrot) -> Context:
    out, scratch = tmp_path / name / "out", tmp_path / name / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)

    def open_engine(artifact: Artifact) -> Parrot:
        return engine

    return Context(out, scratch, 0, Progress(quiet=True), ReportBuilder(), open_engine)


@pytest.fixture
def data(tmp_path: Path, bfcl_rows: list[dict[str, Any]]) -> Dataset:
    write_chat(tmp_path / "data", bfcl_rows[:150])
    found = load(str(tmp_path / "data"))
    assert isinstance(found, Dataset)
    return found


@pytest.fixture
def model(pico: Path) -> Model:
    found = load(str(pico))
    assert isinstance(found, Model)
    return found


def references(data: Dataset, keep: int) -> dict[str, str]:
    return {r["messages"][-2]["content"]: flatten_messages(r)[-1].content for r in read_chat(data)[:keep]}


def test_score_is_the_share_of_right_answers(tmp_path: Path, data: Dataset, model: Model) -> None:
    parrot = Parrot(references(data, 60))
    made = evaluate(EvaluateConfig(task="function-call"), model, data, context(tmp_path, "a", parrot))
    assert made.metrics["score"] == pytest.approx(60 / 150)
    assert made.metrics["low"] < 0.4 < made.metrics["high"]
    assert len(parrot.asked) == 150


def test_answers_survive_a_break(tmp_path: Path, data: Dataset, model: Model) -> None:
    first = Parrot(references(data, 150), break_after=64)
    with pytest.raises(EngineError):
        evaluate(EvaluateConfig(task="function-call"), model, data, context(tmp_path, "a", first))
    file = tmp_path / "a" / "scratch" / "answers.jsonl"
    assert len(file.read_text().splitlines()) == 64
    file.write_text(file.read_text() + '{"id": "cut sho')  # as a kill leaves it
    second = Parrot(references(data, 150))
    made = evaluate(EvaluateConfig(task="function-call"), model, data, context(tmp_path, "a", second))
    assert len(second.asked) == 150 - 64
    assert (
        not set(first.asked) & set(second.asked) or len({*first.asked, *second.asked}) < 150
    )  # some questions are asked by two rows
    assert made.metrics["score"] == 1.0


def test_shots_stand_in_front_and_need_examples(tmp_path: Path, data: Dataset, model: Model) -> None:
    write_chat(tmp_path / "few", read_chat(data)[:60])
    with pytest.raises(UserError, match="num_fewshot is 90, but there are only 60 rows"):
        evaluate(
            EvaluateConfig(task="function-call", num_fewshot=90),
            model,
            data,
            context(tmp_path, "a", Parrot({})),
            fewshot=Dataset(tmp_path / "few"),
        )
    with pytest.raises(UserError, match="unknown task 'x'"):
        evaluate(EvaluateConfig(task="x"), model, data, context(tmp_path, "b", Parrot({})))
    made = evaluate(
        EvaluateConfig(task="function-call", num_fewshot=1, limit=5),
        model,
        data,
        context(tmp_path, "c", Parrot(references(data, 5))),
        fewshot=data,
    )
    assert made.metrics["score"] == 1.0


def test_only_the_same_samples_can_be_compared(tmp_path: Path) -> None:
    def report(name: str, samples: dict[str, float], task: str = "t") -> Report:
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"id": i, "score": s, "question": "q", "text": "a"} for i, s in samples.items()]
        (folder / "report.json").write_text(json.dumps({"task": task, "samples": rows}))
        return Report(folder, name=name)

    a, b = report("a", {"1": 0.0, "2": 1.0, "3": 0.0}), report("b", {"3": 1.0, "1": 1.0, "2": 1.0})
    made = compare(CompareEvaluationsConfig(), a, b, context(tmp_path, "x", Parrot({})))
    assert made.metrics["difference"] == pytest.approx(2 / 3)
    assert (made.metrics["gained"], made.metrics["lost"]) == (2, 0)
    for other in (report("c", {"1": 1.0}), report("d", {"1": 0.0, "2": 1.0, "3": 0.0}, task="u")):
        with pytest.raises(DataError, match="cannot be paired"):
            compare(CompareEvaluationsConfig(), a, other, context(tmp_path, "y", Parrot({})))
