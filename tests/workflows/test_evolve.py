"""A merge's numbers by CMA-ES: the numbers of a known child are found again, and a search that was killed is the search
that it would have been.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.merge.test_methods_conformance import merged
from tests.oracles.merges import GRADIENT, models, weighted

from llmworks.cli import main
from llmworks.core.artifact import Model
from llmworks.core.errors import ModelError, UserError
from llmworks.core.workspace import Workspace
from llmworks.evaluate.suites import SuiteTask
from llmworks.merge.plan.config import MergeConfig
from llmworks.runtime.session import Session, load
from llmworks.tune.search.cma import evolve
from llmworks.tune.search.genome import MergeParameter, list_parameters, set_values
from llmworks.workflows import evolve as evolutions
from llmworks.workflows.evolve import EvolutionJob, run_evolution

FILE = {"merge_method": "task_arithmetic", "base_model": "base", "models": weighted(("a", 0.5), ("b", 0.5))}


def test_numbers_that_can_be_searched() -> None:
    """Weights, densities, t and their like, wherever they stand; as many as there are points of a gradient."""
    names = [
        gene.name
        for gene in list_parameters({**FILE, "parameters": {"lambda": 1.0, "normalize": True, "int8_mask": 1}})
    ]
    assert names == ["models.0.parameters.weight", "models.1.parameters.weight", "parameters.lambda"]
    genes = list_parameters({"merge_method": "slerp", "parameters": {"t": GRADIENT}})
    assert [(gene.name, gene.start) for gene in genes][:2] == [
        ("parameters.t.0.value.0", 0),
        ("parameters.t.0.value.1", 0.5),
    ]
    assert len(genes) == 11
    spread = list_parameters(FILE, gradient=3, negative=True)
    assert len(spread) == 6
    assert (spread[0].low, spread[0].high) == (-1.0, 1.5)
    made = set_values(FILE, spread, [0, 1, 2, 3, 4, 5])
    assert [model["parameters"]["weight"] for model in made["models"]] == [[0, 1, 2], [3, 4, 5]]
    assert MergeConfig.model_validate(made)
    assert FILE["models"][0]["parameters"]["weight"] == 0.5
    with pytest.raises(UserError, match="no numeric parameter to search"):
        list_parameters({"merge_method": "model_stock", "models": [{"model": "a"}]})


@pytest.mark.parametrize(
    ("given", "points", "starts"),
    [
        ([0, 1], 3, [0, 0.5, 1]),
        ([0, 1, 0], 2, [0, 0]),
        ([0.2, 0.4, 0.8], 5, [0.2, 0.3, 0.4, 0.6, 0.8]),
        ([0.7], 2, [0.7, 0.7]),
        (0.7, 2, [0.7, 0.7]),
        ("1e-1", 2, [0.1, 0.1]),
    ],
)
def test_a_gradient_of_other_points(given: Any, points: int, starts: list[float]) -> None:
    """Begins as the line that the file has, and is written with its own points; a value beside filters stays one
    number.
    """
    plain = {"parameters": {"t": given, "weight": [{"filter": "mlp", "value": given}, 0.5]}}
    genes = list_parameters(plain, gradient=points)
    assert [gene.start for gene in genes] == pytest.approx([*starts, *starts, 0.5])
    made = set_values(plain, genes, [gene.start for gene in genes])["parameters"]
    assert made["t"] == made["weight"][0]["value"] == pytest.approx(starts)
    assert made["weight"][1] == 0.5


def test_an_optimum_is_found(tmp_path: Path) -> None:
    """Of a function whose best is known; the first attempt is what the file has; twice the same."""
    genes = [MergeParameter((name,), 0.0, 2.0, 1.0) for name in "xyz"]
    target = [0.3, 1.7, 0.9]

    def judge(values: Sequence[float]) -> tuple[float, dict[str, float]]:
        return -sum((a - b) ** 2 for a, b in zip(values, target, strict=True)), {}

    found = evolve(genes, judge, tmp_path / "one.jsonl", attempts=160, population=8, seed=3)
    assert found[0].values == (1.0, 1.0, 1.0)
    assert max(found, key=lambda one: one.score).values == pytest.approx(target, abs=0.05)
    again = evolve(genes, judge, tmp_path / "two.jsonl", attempts=160, population=8, seed=3)
    assert [one.values for one in again] == [one.values for one in found]


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    """With a line of its journal cut off: nothing is judged twice, and it ends where it would have ended."""
    genes = [MergeParameter((name,), 0.0, 1.0, 0.5) for name in "xy"]
    calls = 0

    def judge(values: Sequence[float]) -> tuple[float, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return -abs(values[0] - 0.2) - abs(values[1] - 0.8), {"task": 1.0}

    with pytest.raises(KeyboardInterrupt):
        evolve(genes, judge, tmp_path / "j.jsonl", attempts=30, population=6, seed=1)
    with (tmp_path / "j.jsonl").open("a") as stream:
        stream.write('{"values": [0.1, 0.')
    found = evolve(genes, judge, tmp_path / "j.jsonl", attempts=30, population=6, seed=1)
    calls = 100
    straight = evolve(genes, judge, tmp_path / "k.jsonl", attempts=30, population=6, seed=1)
    assert [one.values for one in found] == [one.values for one in straight]
    assert calls == 100 + len(straight)


def test_weights_of_a_known_child_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by how near a merge's weights are to those of a child of 0.8 and 0.2; attempts leave nothing behind, the
    best one stays.
    """
    family = tmp_path / "family"
    models(family)
    merged({**FILE, "models": weighted(("a", 0.8), ("b", 0.2))}, family, tmp_path / "target")
    wanted = load_file(tmp_path / "target" / "model.safetensors")

    class Scored:
        def __init__(self, score: float) -> None:
            self.metrics = {"score": score, "low": score, "high": score, "samples": 1}

    def evaluate(self: EvolutionJob, model: Model, item: SuiteTask, session: Session) -> Any:
        tensors = load_file(model.path / "model.safetensors")
        return Scored(1 / (1 + sum(float((tensors[name] - one).square().sum()) for name, one in wanted.items())))

    monkeypatch.setattr(EvolutionJob, "evaluate", evaluate)
    pages: list[Any] = []
    monkeypatch.setattr(evolutions, "_write_report", lambda job, found, names, child: pages.append((found, names)))
    found: dict[str, Any] = {name: load(str(family / name)) for name in ("base", "a", "b")}
    workspace = Workspace(tmp_path / "ws")
    job = EvolutionJob(
        "merge",
        MergeConfig.model_validate(FILE),
        found,
        Session(workspace),
        [SuiteTask(task="x")],
        attempts=36,
        population=7,
        say=lambda line: None,
    )
    _, child = run_evolution(job)
    best = max(pages[0][0], key=lambda one: one.score)
    assert best.values == pytest.approx((0.8, 0.2), abs=0.08)
    assert torch.allclose(
        load_file(child.path / "model.safetensors")["model.norm.weight"], wanted["model.norm.weight"], atol=0.1
    )
    assert [path.name for path in (workspace.root / "store").iterdir()] == [child.path.name]


def test_a_fault_of_a_file_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that a method refuses count 0; a broken model ends the search, and nothing of it is kept."""
    family = tmp_path / "family"
    models(family)
    found: dict[str, Any] = {name: load(str(family / name)) for name in ("base", "a", "b")}

    def job(error: Exception) -> EvolutionJob:
        def merge(self: EvolutionJob, *_: Any) -> Any:
            raise error

        monkeypatch.setattr(EvolutionJob, "merge", merge)
        return EvolutionJob(
            "merge",
            MergeConfig.model_validate(FILE),
            found,
            Session(tmp_path / "ws"),
            [SuiteTask(task="x")],
            attempts=2,
            population=2,
            say=lambda line: None,
        )

    with pytest.raises(ModelError, match="cut off"):
        run_evolution(job(ModelError("cut off")))
    assert (
        not list((tmp_path / "ws").rglob("journal.jsonl"))
        or not next((tmp_path / "ws").rglob("journal.jsonl")).read_text()
    )
    with pytest.raises(UserError, match="sum to zero"):  # of the best, which is made again at the end
        run_evolution(job(UserError("sum to zero")))
    assert len(next((tmp_path / "ws").rglob("journal.jsonl")).read_text().splitlines()) >= 2


def test_the_same_search_twice_at_once_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes would throw away one another's attempts."""
    family = tmp_path / "family"
    models(family)
    found: dict[str, Any] = {name: load(str(family / name)) for name in ("base", "a", "b")}
    inside = most = 0

    def judged(*_: Any, **__: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        raise UserError("seen")

    monkeypatch.setattr(evolutions, "evolve", judged)
    jobs = [
        EvolutionJob(
            "merge",
            MergeConfig.model_validate(FILE),
            found,
            Session(tmp_path / "ws"),
            [SuiteTask(task="x")],
            say=lambda line: None,
        )
        for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(run_evolution, job) for job in jobs]
    assert all(isinstance(one.exception(), UserError) for one in ends)
    assert most == 1


def test_from_the_command_line(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two generations with a task of five rows; the page and the model; again, and everything is known."""
    shutil.copytree(pico, tmp_path / "one")
    shutil.copytree(pico, tmp_path / "two")
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: one * 1.01 for name, one in tensors.items()},
        tmp_path / "two" / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "ask": f"What is {i}?", "options": ["one", "two"], "right": i % 2}) + "\n"
            for i in range(5)
        )
    )
    (tmp_path / "task.yaml").write_text(
        f"name: tiny\nwhat: two answers\nkind: choice\ndata: {tmp_path}/rows.jsonl\nprompt: plain\nquestion:"
        ' "{{ask}}"\nchoices: "{{options}}"\nanswer: "{{right}}"\nmetrics: [acc]\n'
    )
    (tmp_path / "merge.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: one, parameters: {weight: 0.5}}\n  - {model: two, parameters:"
        " {weight: 0.5}}\n"
    )
    monkeypatch.chdir(tmp_path)
    words = [
        "tune",
        "evolve",
        "merge.yml",
        "--suite",
        "task.yaml",
        "--attempts",
        "3",
        "--population",
        "2",
        "--out",
        "page",
        "--out-model",
        "best",
        "--quiet",
        "--workspace",
        "ws",
    ]
    assert main(words) == 0
    assert "Best:" in capsys.readouterr().out
    page = json.loads((tmp_path / "page" / "report.json").read_text())
    assert set(page["scores"]) == {"best", "one", "two"}
    assert all(found["task.yaml"][0] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) for found in page["scores"].values())
    assert max(one["score"] for one in page["attempts"]) > 0
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert main(words) == 0
    assert "✓" not in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.yml").write_text("merge_method: linear\nmodels:\n  - {model: nowhere, parameters: {weight: 1}}\n")
    assert (
        main(["tune", "evolve", str(tmp_path / "m.yml"), "--suite", "quick", "--workspace", str(tmp_path / "ws")]) == 2
    )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
