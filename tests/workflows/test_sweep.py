"""Sweeps: they find what is better, go on after a kill with nothing tried twice, say what failed, and share the steps
that trials have in common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.train.test_sft import chats

from llmworks.cli import main
from llmworks.core.artifact import Report
from llmworks.core.errors import DataError, RecipeError, UserError
from llmworks.core.workers import WorkerPool
from llmworks.runtime.session import Session
from llmworks.tune.search.optuna_study import SweepStudy, SweepTrial
from llmworks.tune.search.search_space import SweepConfig, format_overrides, load_search
from llmworks.workflows import sweep as sweeping
from llmworks.workflows.sweep import TrialJob, TrialResult, run_trial, sweep

RECIPE = """
name: tiny
seed: 0
steps:
  base: {{use: "path:{model}"}}
  rows: {{use: "path:{data}"}}
  tuned:
    stage: train.sft
    inputs: {{model: base, data: rows, eval_data: rows}}
    config: {{num_train_epochs: 2, num_sample_prompts: 0, lora: {{r: 4}}}}
"""
SEARCH: dict[str, Any] = {
    "metric": "tuned.eval_loss",
    "direction": "minimize",
    "trials": 4,
    "random": 2,
    "fields": {
        "tuned.optimizer.learning_rate": {"low": 1e-5, "high": 0.1, "log": True},
        "tuned.lora.target_modules": {"choices": ["all-linear", ["q_proj"]]},
    },
}


def study(tmp_path: Path, **more: Any) -> SweepStudy:
    return SweepStudy(
        SweepConfig.model_validate(
            {
                "metric": "a.b",
                "fields": {"a.x": {"low": -5, "high": 5}, "a.kind": {"choices": ["bad", "good"]}},
                "random": 6,
                **more,
            }
        ),
        tmp_path / "journal.log",
    )


def score(values: Any) -> float:
    """A hill at x = 2 for one kind, all below it for the other."""
    return float(-((values["a.x"] - 2) ** 2) - (30 if values["a.kind"] == "bad" else 0))


def test_it_finds_the_top_of_a_hill(tmp_path: Path) -> None:
    """Near the top, with what is tried getting better; the fields' shares are told."""
    found = study(tmp_path, trials=40)
    for _ in range(40):
        trial = found.ask()
        found.tell(SweepTrial(trial.number, trial.values, score(trial.values)))
    assert found.best is not None
    assert found.best.values["a.kind"] == "good"
    assert abs(found.best.values["a.x"] - 2) < 0.3
    scores = [t.score for t in found.trials if t.score is not None]
    assert sum(scores[20:]) / 20 > sum(scores[:6]) / 6  # what was found is followed
    importance = found.compute_importance()
    assert sum(importance.values()) == pytest.approx(1)


def test_what_was_under_way_is_tried_again(tmp_path: Path) -> None:
    """A process ends between asking and telling: the next one begins with the same values, keeps what was told, and
    draws others than before.
    """
    first = study(tmp_path)
    told = first.ask()
    first.tell(SweepTrial(told.number, told.values, 1.0, seconds=3.0))
    lost = first.ask()
    second = study(tmp_path)
    assert [(t.values, t.score, t.seconds) for t in second.trials] == [(told.values, 1.0, 3.0)]
    again = second.ask()
    assert again.values == lost.values
    third = study(tmp_path)  # killed again
    assert third.ask().values == lost.values
    drawn = [second.ask().values["a.x"] for _ in range(3)]
    assert len({told.values["a.x"], lost.values["a.x"], *drawn}) == 5


@pytest.mark.slow
def test_a_sweep_of_a_recipe(tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line: the report names the best, whose steps bear the recipe's names; twice the same command tries
    nothing; more trials go on.
    """
    chats(tmp_path / "rows", 12)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    (tmp_path / "search.yaml").write_text(json.dumps(SEARCH))
    words = [
        "tune",
        "sweep",
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "search.yaml"),
        "--workspace",
        str(tmp_path / "ws"),
        "--json",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    data = json.loads((Path(told["report"]) / "report.json").read_text())
    assert (told["trials"], told["failed"]) == (4, 0)
    assert told["score"] == min(t["score"] for t in data["trials"])
    bound = json.loads((tmp_path / "ws" / "tiny" / "tuned" / "manifest.json").read_text())
    assert bound["metrics"]["eval_loss"] == told["score"]
    assert bound["config"]["optimizer"]["learning_rate"] == pytest.approx(told["best"]["tuned.optimizer.learning_rate"])
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "resuming after 4 trials" in captured.err
    assert "trial 5" not in captured.err
    assert main([*words, "--trials", "5"]) == 0
    captured = capsys.readouterr()
    assert "trial 5" in captured.err
    assert json.loads(captured.out)["trials"] == 5
    assert "it is biased upward" in (Path(json.loads(captured.out)["report"]) / "report.md").read_text()


@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_others_go_on(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate at which the loss is no number: the page says why, and the best is of the others.

    A metric that is not there is named.
    """
    chats(tmp_path / "rows", 12)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    search = SweepConfig.model_validate(
        {**SEARCH, "trials": 4, "random": 4, "fields": {"tuned.optimizer.learning_rate": {"choices": [1e-3, 1e30]}}}
    )
    found = sweep(recipe, search, Session(tmp_path / "ws"))
    trials = found.read()["trials"]
    assert {t["values"]["tuned.optimizer.learning_rate"] for t in trials if t["score"] is not None} == {1e-3}
    assert all("the loss is" in t["error"] for t in trials if t["score"] is None)
    assert found.metrics["failed"] == sum(t["score"] is None for t in trials) > 0
    monkeypatch.setattr(
        sweeping.RecipeRun,
        "run",
        lambda self: self.artifacts.update(tuned=Report(tmp_path, metrics={"loss": float("nan")})),
    )
    nothing = run_trial(TrialJob(recipe, tmp_path / "ws", (), "tuned", "loss"))
    assert (nothing.score, nothing.error) == (None, "tuned.loss is nan")
    monkeypatch.undo()
    outcome = run_trial(
        TrialJob(
            recipe, tmp_path / "ws", tuple(format_overrides({"tuned.optimizer.learning_rate": 1e-3})), "tuned", "beauty"
        )
    )
    assert outcome.score is None
    assert outcome.error.startswith("tuned has no metric 'beauty'; it has accuracy")
    with pytest.raises(DataError, match="no trial of tiny has a score; first error: tuned has no metric"):
        sweep(
            recipe,
            SweepConfig.model_validate({**SEARCH, "metric": "tuned.beauty", "trials": 1}),
            Session(tmp_path / "ws"),
        )


@pytest.mark.slow
def test_trials_run_beside_one_another(tmp_path: Path, pico: Path) -> None:
    """Two processes: as many trials as asked for, each told once."""
    chats(tmp_path / "rows", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    found = sweep(
        recipe, SweepConfig.model_validate({**SEARCH, "trials": 3}), Session(tmp_path / "ws", pool=WorkerPool(2))
    )
    assert [t["number"] for t in found.read()["trials"]] == [0, 1, 2]
    assert found.metrics["failed"] == 0


@pytest.mark.slow
def test_trials_run_on_ray(tmp_path: Path, pico: Path) -> None:
    chats(tmp_path / "rows", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    found = sweep(
        recipe, SweepConfig.model_validate({**SEARCH, "trials": 2}), Session(tmp_path / "ws", pool=WorkerPool(2, "ray"))
    )
    assert (found.metrics["trials"], found.metrics["failed"]) == (2, 0)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats(tmp_path / "rows", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    asked: list[tuple[str, ...]] = []

    def trial(unit: TrialJob) -> TrialResult:
        asked.append(unit.sets)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run_trial(unit)

    monkeypatch.setattr(sweeping, "run_trial", trial)
    search = SweepConfig.model_validate(SEARCH)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, search, Session(tmp_path / "ws"))
    found = sweep(recipe, search, Session(tmp_path / "ws"))
    assert asked[3] == asked[2]
    assert len(asked) == 5
    assert found.metrics["trials"] == 4


BROKEN: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "must be a mapping"),
    "no metric": ({"fields": {"a.b": {"choices": [1]}}}, "metric: Field required"),
    "a metric of nothing": ({**SEARCH, "metric": "held_out"}, "metric: String should match"),
    "no fields": ({**SEARCH, "fields": {}}, "fields: "),
    "both": ({**SEARCH, "fields": {"a.b": {"choices": [1], "low": 0}}}, "give either choices, or low and high"),
    "the wrong way": ({**SEARCH, "fields": {"a.b": {"low": 2, "high": 1}}}, "low must be less than high"),
    "a logarithm of nothing": (
        {**SEARCH, "fields": {"a.b": {"low": 0, "high": 1, "log": True}}},
        "log needs a low above zero",
    ),
    "an unknown key": ({**SEARCH, "budget": 3}, "budget: Extra inputs"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_search_files_that_are_broken(what: str, tmp_path: Path) -> None:
    values, message = BROKEN[what]
    (tmp_path / "search.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_search(tmp_path / "search.yaml")


def test_searches_that_do_not_fit_the_recipe(tmp_path: Path, pico: Path) -> None:
    chats(tmp_path / "rows", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=pico, data=tmp_path / "rows"))
    for change, kind, message in (
        ({"metric": "scored.score"}, UserError, "has no stage 'scored'; it has tuned"),
        ({"fields": {"tuned.lora.size": {"choices": [1]}}}, RecipeError, "size"),
        ({"fields": {"tuned.lora.r": {"low": -4, "high": 4, "whole": True}}}, RecipeError, r"lora\.r"),
    ):
        with pytest.raises(kind, match=message):
            sweep(recipe, SweepConfig.model_validate({**SEARCH, **change}), Session(tmp_path / "ws"))
    with pytest.raises(UserError, match="no such file"):
        load_search(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not YAML"):
        load_search(tmp_path / "odd.yaml")
