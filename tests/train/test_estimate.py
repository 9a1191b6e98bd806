"""What `plan` says of a training before it starts is what the training then is: parameters, steps, tokens, operations;
and what processes share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.errors import UserError
from llmworks.data.store.rows import write_chat
from llmworks.model.io.families import parse_shape
from llmworks.model.io.load import load_model
from llmworks.model.lora import lora
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape
from llmworks.train.distributed.config import ParallelConfig
from llmworks.train.estimate.finetune import TEMPLATE_CHARS, DatasetStats, FinetuneEstimate, measure_dataset
from llmworks.train.estimate.pretrain import BASE_PROCESS_BYTES, PretrainEstimate, TrialMeasurement
from llmworks.train.finetune.lora_config import LoraConfig
from llmworks.train.pretrain import PretrainConfig, PretrainOptimizer
from llmworks.train.sft import SftConfig

STEPS = """
name: tiny
steps:
  text: {use: "path:FOLDER"}
  read: {stage: data.read, inputs: {data: text}}
  tokenizer: {stage: tokenize.train, inputs: {data: read}, config: {vocab_size: 300}}
  packed: {stage: data.pack, inputs: {model: tokenizer, data: read}, config: {max_length: 32}}
  new: {stage: model.new, inputs: {tokenizer: tokenizer}, config: SMALL}
  old: {stage: model.recurrent, inputs: {tokenizer: tokenizer}, config: GRU}
""".replace(
    "SMALL", "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}"
).replace("GRU", "{rnn_type: gru, embedding_dim: 32, max_position_embeddings: 32}")
TRAININGS = (  # a line each
    "  trained: {stage: train.pretrain, inputs: {model: new, data: packed, eval_data: packed},"
    " config: {batch_size: 2, num_train_epochs: 2, sample_max_tokens: 4, eval_samples: 4}}\n"
    "  more: {stage: train.pretrain, inputs: {model: trained, data: packed},"
    " config: {batch_size: 4, num_train_tokens: 500, sample_max_tokens: 0}}\n"
    "  gru: {stage: train.pretrain, inputs: {model: old, data: packed}, config: {batch_size: 2, sample_max_tokens:"
    " 0}}\n"
)
RECIPE = STEPS + TRAININGS


@pytest.mark.slow
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
    assert "unknown" in capsys.readouterr().out
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
    shape = Shape(
        vocab_size=1024,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    training = PretrainEstimate(PretrainConfig(batch_size=4), shape, 64, rows=100, tokens=6000)
    network = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    numbers = sum(p.numel() for p in network.parameters())
    assert (training.parameters, training.steps, training.num_tokens) == (numbers, 25, 6000)
    matrices = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    assert training.flops == 3 * (2 * matrices + 4 * 4 * 64 * 32) * 6000
    again = PretrainEstimate(
        PretrainConfig(batch_size=4, gradient_checkpointing=True), shape, 64, rows=100, tokens=6000
    )
    assert again.flops == training.flops * 4 / 3
    assert again.estimate_activations() < training.estimate_activations()

    def states(processes: int = 1, **more: object) -> float:
        t = PretrainEstimate(
            PretrainConfig.model_validate({"batch_size": 4, "gradient_accumulation_steps": 2, **more}),
            shape,
            64,
            processes=processes,
        )
        return t.memory - BASE_PROCESS_BYTES - t.estimate_activations()

    assert states() == 16 * numbers  # weights, gradients, two moments
    assert states(optimizer=PretrainOptimizer(name="lion").model_dump()) == 12 * numbers
    assert states(ema_decay=0.9) == 20 * numbers
    assert states(8, parallel=ParallelConfig(data_parallel="fsdp").model_dump()) == 2 * numbers
    assert states(2) == 16 * numbers  # replicated
    assert states(4, parallel=ParallelConfig(data_parallel="fsdp", tensor_parallel_size=2).model_dump()) == 4 * numbers
    half = PretrainEstimate(PretrainConfig(batch_size=4, gradient_accumulation_steps=2), shape, 64, processes=8)
    assert (
        half.estimate_activations()
        < PretrainEstimate(
            PretrainConfig(batch_size=4, gradient_accumulation_steps=2), shape, 64
        ).estimate_activations()
    )  # one row each


def test_layers_that_were_not_tried() -> None:
    one, two = TrialMeasurement(1.0, 0.1, 2.0, 5.0, 100.0), TrialMeasurement(1.5, 0.15, 3.0, 5.0, 140.0)
    assert one.deeper(two, 9) == TrialMeasurement(5.5, pytest.approx(0.55), 11.0, 5.0, 460.0)
    assert two.deeper(one, 9) == two  # a machine that had other work while one layer was tried
    config = PretrainConfig(batch_size=4, eval_steps=10, eval_samples=50)
    training = PretrainEstimate(
        config,
        Shape(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1),
        64,
        rows=100,
        tokens=6400,
        held_out=20,
    )
    assert training.estimate_seconds(one) == pytest.approx(5.0 + 25 * 1.0 + (3 + 2) * 2.0 + (3 * 20 + 20) * 0.1)


@pytest.mark.slow
def test_a_trial_runs_what_is_asked() -> None:
    deep = PretrainEstimate(
        PretrainConfig(batch_size=2, sample_max_tokens=2),
        Shape(vocab_size=512, hidden_size=32, num_attention_heads=2, num_hidden_layers=12, max_position_embeddings=32),
        32,
    )
    trial = deep.try_steps()
    assert min(trial.step, trial.row, trial.around) > 0
    assert 3e8 < trial.memory < 3e9


@pytest.mark.slow
def test_a_fine_tuning_is_what_then_happens(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workspace = (
        recipe_file(num_train_epochs=2.5, batch_size=3, gradient_accumulation_steps=2),
        ["--workspace", str(tmp_path / "ws")],
    )

    def planned(*more: str) -> dict[str, Any]:
        assert main(["plan", str(recipe), *workspace, "--json", *more]) == 0
        (row,) = [row for row in json.loads(capsys.readouterr().out) if row["training"]]
        return dict(row)

    before = planned("--measure")  # there is nothing to try it with
    assert before["training"]["steps"] == before["training"]["tokens"] == 0
    prepared = tmp_path / "prepared.yaml"
    prepared.write_text(recipe.read_text().partition("  tuned:")[0])
    assert main(["run", str(prepared), *workspace, "--quiet"]) == 0
    capsys.readouterr()
    tried = planned("--measure")
    assert tried["expect"]["seconds"] > 0
    assert tried["training"]["memory_bytes"] > before["training"]["parameters"] * 4 + BASE_PROCESS_BYTES
    assert main(["run", str(recipe), *workspace, "--quiet"]) == 0
    metrics = json.loads((tmp_path / "ws" / "small" / "tuned" / "manifest.json").read_text())["metrics"]
    assert (tried["training"]["steps"], tried["training"]["trainable_parameters"]) == (
        metrics["steps"],
        metrics["trainable_parameters"],
    )


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_is_counted_without_weights(targets: str | list[str], pico: Path) -> None:
    network = load_model(pico)
    lora.attach_lora(network, targets, lora.LoraSettings(3, 6.0))
    shape = parse_shape(json.loads((pico / "config.json").read_text()))[1]
    tuning = FinetuneEstimate(
        SftConfig(lora=LoraConfig(r=3, target_modules=targets)), pico, shape, DatasetStats(8, 700.0, 1400, 0.25)
    )
    assert (
        tuning.trainable_parameters
        == tuning.saved_parameters
        == sum(p.numel() for p in network.parameters() if p.requires_grad)
    )
    assert tuning.parameters == sum(p.numel() for p in network.parameters() if not p.requires_grad)
    # by hand, of 2 passes over 8 conversations of 200 tokens: matrices of the layers and attention to half a text, a
    # quarter of the head, the adapter thrice
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    head, attention = shape.vocab_size * 64, 2 * 2 * 64 * 100
    assert tuning.flops == pytest.approx((4 * (layers + attention + head / 4) + 6 * tuning.trainable_parameters) * 3200)


def test_letters_of_conversations(chat_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"tools": [], "answer": None} for line in chat_file.read_text().splitlines()]
    write_chat(tmp_path / "data", rows)
    sizes = [sum(TEMPLATE_CHARS + len(turn["content"]) for turn in row["messages"]) for row in rows]
    learned = sum(TEMPLATE_CHARS + len(row["messages"][1]["content"]) for row in rows)
    assert measure_dataset(Dataset(tmp_path / "data")) == DatasetStats(
        12, pytest.approx(sum(sizes) / 12), max(sizes), pytest.approx(learned / sum(sizes))
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("trained.batch_size=20000",), "trained: the data has "),
        (
            ("new.max_position_embeddings=16",),
            "trained: rows have 32 tokens, but the context length of the model is 16",
        ),
        (("trained.num_train_epochs=.inf",), "finite"),
        (
            ("trained.parallel.pipeline_parallel_size=4", "--processes", "4"),
            "trained: parallel.pipeline_parallel_size 4 exceeds the model's 2 layers",
        ),
        (("--processes", "0"), "--processes 0"),
        (("--processes", "2", "--measure"), "--measure runs in one local process"),
        (("new.hidden_size=16384", "new.num_attention_heads=16", "new.num_hidden_layers=1000", "--measure"), "GB, "),
    ],
)
def test_what_would_be_refused_is_told_before(
    more: tuple[str, ...], says: str, planned: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workspace = planned
    sets = [word for m in more for word in (("--set", m) if "=" in m else (m,))]
    assert main(["plan", str(recipe), *workspace, *sets]) == 2
    told = capsys.readouterr().err.strip().removeprefix("running a few steps of trained ...").strip()
    assert says in told
    assert len(told.splitlines()) == 1


def test_what_a_trial_meets_is_told(planned: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, workspace = planned
    tokenizer = next((recipe.parent / "ws" / "tiny" / "tokenizer").glob("tokenizer.json"))
    whole = tokenizer.read_bytes()
    assert main(["plan", str(recipe), *workspace, "--set", "trained.optimizer.name=adamw_8bit", "--measure"]) == 3
    assert "adamw_8bit needs " in capsys.readouterr().err
    tokenizer.chmod(0o644)
    tokenizer.write_bytes(whole[:100])
    assert main(["plan", str(recipe), *workspace]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, list[str]]:
    """A recipe whose data are made, and whose models and trainings are not."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(f"Row {i} of words, and {i * 7} more. " for i in range(300)))
    recipe, workspace = tmp_path / "tiny.yaml", ["--workspace", str(tmp_path / "ws")]
    recipe.write_text(
        "\n".join(
            line
            for line in RECIPE.replace("FOLDER", str(tmp_path / "text")).splitlines()
            if "gru" not in line and "more" not in line
        )
    )
    data = tmp_path / "data.yaml"
    data.write_text(
        "\n".join(
            line for line in recipe.read_text().splitlines() if "train.pretrain" not in line and "model.new" not in line
        )
    )
    assert main(["run", str(data), *workspace, "--quiet"]) == 0
    capsys.readouterr()
    return recipe, workspace


def test_texts_and_completions_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a" * 30, "completion": "b" * n}) + "\n" for n in (10, 30)))
    found = measure_dataset(Dataset(file, name="rows"))
    assert (found.count, found.mean_chars, found.max_chars, found.label_share) == (2, 50.0, 60, 0.4)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_a_soft_prompt_is_counted_without_weights(kind: str, pico: Path) -> None:
    from llmworks.train.finetune.trainable import open_trainable_model

    config = SftConfig.model_validate({"method": kind, "soft_prompt": {"num_virtual_tokens": 5}})
    tuned = open_trainable_model(pico)
    tuned.add_soft_prompt(kind, 5, "")
    shape = Shape(
        vocab_size=328,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    assert FinetuneEstimate(config, pico, shape).trainable_parameters == tuned.num_trainable_parameters


def test_a_layer_that_is_not_there_is_told_before(pico: Path) -> None:
    shape = parse_shape(json.loads((pico / "config.json").read_text()))[1]
    tuning = FinetuneEstimate(SftConfig.model_validate({"lora": {"target_modules": ["q_proj", "vproj"]}}), pico, shape)
    with pytest.raises(UserError, match="the model has no layer 'vproj', did you mean 'v_proj'"):
        tuning.check()
    FinetuneEstimate(
        SftConfig.model_validate({"lora": {"target_modules": ["q_proj", "down_proj"]}}), pico, shape
    ).check()
