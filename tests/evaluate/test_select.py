"""The best of several models, and what is said of the skills that it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmworks.core.artifact import Manifest, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.evaluate.select import SelectConfig, select


def model(place: Path, name: str) -> Model:
    path = place / name
    path.mkdir()
    (path / "model.safetensors").write_text(name)
    manifest = Manifest(
        kind="model",
        digest=name * 8,
        key="",
        stage="",
        revision=0,
        derivation="declared",
        config={},
        parents=[],
        files={},
    )
    return Model(path, manifest=manifest, name=name)


def evaluation(place: Path, of: Model, task: str, scores: list[float]) -> Report:
    path = place / f"{of.name}-{task}"
    path.mkdir()
    samples = [
        {"id": str(at), "score": score, "question": "q", "text": "t", "reference": "r", "group": str(at)}
        for at, score in enumerate(scores)
    ]
    mean = sum(scores) / len(scores)
    (path / "report.json").write_text(
        json.dumps(
            {
                "task": task,
                "model": of.name,
                "samples": samples,
                "metric": "acc",
                "kind": "choice",
                "intervals": {"acc": {"value": mean, "low": mean, "high": mean}},
                "protocol": {},
            }
        )
    )
    manifest = Manifest(
        kind="report",
        digest=(of.name + task) * 4,
        key="",
        stage="evaluate",
        revision=0,
        derivation="declared",
        config={},
        parents=[],
        files={},
        metrics={"score": mean, "low": mean - 0.1, "high": mean + 0.1},
        about={"model": of.digest, "task": task},
    )
    return Report(path, manifest=manifest, name=path.name)


def kept(place: Path, models: list[Model], reports: list[Report], **given: Any) -> tuple[Model, ReportBuilder]:
    out, page = place / "out", ReportBuilder()
    out.mkdir()
    return (
        select(
            SelectConfig.model_validate(given),
            {one.name: one for one in models},
            reports,
            Context(out, place, 0, Progress(quiet=True), page, lambda _: None),
        ),
        page,
    )  # type: ignore[arg-type, return-value]


def test_the_best_mean_is_kept_and_what_it_lost_is_said(tmp_path: Path) -> None:
    """A child that is good at both, beside specialists: as good as one of them, worse than the other by more than
    chance.
    """
    a, b, child = (model(tmp_path, name) for name in ("a", "b", "child"))
    good, bad, fair = [1.0] * 90 + [0.0] * 10, [0.0] * 90 + [1.0] * 10, [1.0] * 60 + [0.0] * 40
    reports = [
        evaluation(tmp_path, *one)
        for one in (
            (a, "x", good),
            (a, "y", bad),
            (b, "x", bad),
            (b, "y", good),
            (child, "x", good[::-1]),
            (child, "y", fair),
        )
    ]
    made, page = kept(tmp_path, [a, b, child], reports)
    assert made.metrics["kept"] == "child"
    assert (tmp_path / "out" / "model.safetensors").read_text() == "child"
    assert page.data["verdicts"]["x"].startswith(("not significantly different", "the best"))
    assert page.data["verdicts"]["y"].startswith("worse: -0.300")
    assert made.metrics["num_regressions"] == 1
    assert "worse than the best at y" in page.subtitle


def test_only_some_may_be_kept(tmp_path: Path) -> None:
    a, b = (model(tmp_path, name) for name in ("a", "b"))
    reports = [evaluation(tmp_path, a, "x", [1.0] * 20), evaluation(tmp_path, b, "x", [0.0] * 20)]
    made, _ = kept(tmp_path, [a, b], reports, candidates=["b"])
    assert made.metrics["kept"] == "b"


def test_bad_input(tmp_path: Path) -> None:
    a, b = (model(tmp_path, name) for name in ("a", "b"))
    one, two = evaluation(tmp_path, a, "x", [1.0] * 20), evaluation(tmp_path, a, "y", [1.0] * 20)
    for number, (models, reports, given, said) in enumerate(
        (
            ([a, b], [one], {}, "b has no evaluation on x"),
            ([a], [one, two], {"candidates": ["c"]}, "no model is named 'c'"),
            ([b], [one], {}, "evaluates a model that is not an input"),
            ([a], [], {}, "no evaluations given"),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(DataError, match=said):
            kept(place, models, reports, **given)
