"""What `plan` says of a training before it starts is what the training then is: parameters, steps, tokens, operations; and what processes share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmworks.cli import main
from llmworks.model.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape
from llmworks.train.estimate import PROCESS, Training, Trial, attempt
from llmworks.train.parallel import Parallel
from llmworks.train.pretrain import PretrainConfig, PretrainOptimizer

RECIPE = """
name: tiny
steps:
  text: {use: "path:FOLDER"}
  read: {stage: data.read, inputs: {data: text}}
  tokenizer: {stage: tokenize.train, inputs: {data: read}, config: {vocabulary: 300}}
  packed: {stage: data.pack, inputs: {model: tokenizer, data: read}, config: {length: 32}}
  new: {stage: model.new, inputs: {tokenizer: tokenizer}, config: {width: 64, layers: 2, heads: 2, context: 32}}
  old: {stage: model.recurrent, inputs: {tokenizer: tokenizer}, config: {kind: gru, width: 32, context: 32}}
  trained: {stage: train.pretrain, inputs: {model: new, data: packed, held_out: packed}, config: {batch: 2, epochs: 2, sample_tokens: 4, look_rows: 4}}
  more: {stage: train.pretrain, inputs: {model: trained, data: packed}, config: {batch: 4, tokens: 500, sample_tokens: 0}}
  gru: {stage: train.pretrain, inputs: {model: old, data: packed}, config: {batch: 2, sample_tokens: 0}}
"""


def test_it_is_what_then_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(f"Row {i} of words, and {i * 7} more. " for i in range(300)))
    recipe, workspace = tmp_path / "tiny.yaml", ["--workspace", str(tmp_path / "ws")]
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path / "text")))

    def planned(*more: str) -> dict[str, dict[str, float]]:
        assert main(["plan", str(recipe), *workspace, "--json", *more]) == 0
        return {row["step"]: row["training"] for row in json.loads(capsys.readouterr().out) if row["training"]}

    before = planned()
    assert before["trained"]["steps"] == 0  # its data are not made
    assert before["more"]["steps"] == 4  # of a number of tokens, rows that are full
    assert main(["plan", str(recipe), *workspace]) == 0
    assert "not known yet" in capsys.readouterr().out
    # everything but the trainings is made: then all is known
    short = tmp_path / "short" / "tiny.yaml"
    short.parent.mkdir()
    short.write_text("\n".join(line for line in recipe.read_text().splitlines() if "train.pretrain" not in line))
    assert main(["run", str(short), *workspace, "--quiet"]) == 0
    capsys.readouterr()
    known = planned()
    assert main(["run", str(recipe), *workspace, "--quiet"]) == 0
    for name, expected in known.items():
        metrics = json.loads((tmp_path / "ws" / "tiny" / name / "manifest.json").read_text())["metrics"]
        assert (expected["parameters"], expected["steps"]) == (metrics["parameters"], metrics["steps"])
        assert expected["parameters"] == before[name]["parameters"]
        assert expected["tokens"] == pytest.approx(metrics["tokens"], rel=0.05)  # rows differ in length
    capsys.readouterr()
    assert planned() == {}  # nothing is to run


def test_operations_and_memory_by_hand() -> None:
    shape = Shape(vocabulary=1024, width=64, heads=4, layers=4, hidden=128, context=64)
    training = Training(PretrainConfig(batch=4), shape, 64, rows=100, tokens=6000)
    network = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    numbers = sum(p.numel() for p in network.parameters())
    assert (training.parameters, training.steps, training.read) == (numbers, 25, 6000)
    matrices = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    assert training.work == 3 * (2 * matrices + 4 * 4 * 64 * 32) * 6000
    again = Training(PretrainConfig(batch=4, recompute=True), shape, 64, rows=100, tokens=6000)
    assert again.work == training.work * 4 / 3
    assert again.activations() < training.activations()

    def states(processes: int = 1, **more: object) -> float:
        t = Training(PretrainConfig.model_validate({"batch": 4, "accumulation": 2, **more}), shape, 64, processes=processes)
        return t.memory - PROCESS - t.activations()

    assert states() == 16 * numbers  # weights, gradients, two moments
    assert states(optimizer=PretrainOptimizer(name="lion").model_dump()) == 12 * numbers
    assert states(average=0.9) == 20 * numbers
    assert states(8, parallel=Parallel(data="shard").model_dump()) == 2 * numbers
    assert states(2) == 16 * numbers  # replicated
    assert states(4, parallel=Parallel(data="shard", tensor=2).model_dump()) == 4 * numbers
    half = Training(PretrainConfig(batch=4, accumulation=2), shape, 64, processes=8)
    assert half.activations() < Training(PretrainConfig(batch=4, accumulation=2), shape, 64).activations()  # one row each


def test_layers_that_were_not_tried() -> None:
    one, two = Trial(1.0, 0.1, 2.0, 5.0, 100.0), Trial(1.5, 0.15, 3.0, 5.0, 140.0)
    assert one.deeper(two, 9) == Trial(5.5, pytest.approx(0.55), 11.0, 5.0, 460.0)
    assert two.deeper(one, 9) == two  # a machine that had other work while one layer was tried
    config = PretrainConfig(batch=4, look_every=10, look_rows=50)
    training = Training(config, Shape(vocabulary=64, width=32, heads=2, layers=1), 64, rows=100, tokens=6400, held_out=20)
    assert training.seconds(one) == pytest.approx(5.0 + 25 * 1.0 + (3 + 2) * 2.0 + (3 * 20 + 20) * 0.1)


def test_a_trial_runs_what_is_asked() -> None:
    deep = Training(PretrainConfig(batch=2, sample_tokens=2), Shape(vocabulary=512, width=32, heads=2, layers=12, context=32), 32)
    trial = attempt(deep)
    assert min(trial.step, trial.row, trial.around) > 0
    assert 3e8 < trial.memory < 3e9
