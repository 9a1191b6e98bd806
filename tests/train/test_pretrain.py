"""Pre-training: accumulation is the batch, packing isolates, resume is no interruption bit for bit, and every
architecture learns and is saved as what it was.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.data.store.packed_tokens import PackedDataset
from llmworks.model.io.load import load_model, load_trainable
from llmworks.train.loop.packed_steps import PackedSteps, packed_loss

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed tokens of a text, some kept apart, and a small decoder, in one folder."""
    folder = tmp_path_factory.mktemp("pretrain")
    workspace = ["--workspace", str(folder / "ws"), "--quiet"]
    for name, part in (("train", TEXT[:9000]), ("test", TEXT[9000:])):
        (folder / name).mkdir()
        for i, paragraph in enumerate(part.split("\n\n")):
            (folder / name / f"{i:03}.txt").write_text(paragraph)
        assert main(["data", "read", str(folder / name), "--out", str(folder / f"{name}-read"), *workspace]) == 0
        assert (
            main(
                [
                    "data",
                    "pack",
                    str(pico),
                    str(folder / f"{name}-read"),
                    "--set",
                    "max_length=64",
                    "--out",
                    str(folder / f"{name}-packed"),
                    *workspace,
                ]
            )
            == 0
        )
    for name, words in (
        ("decoder", ["model", "new", str(pico), "--set", "num_attention_heads=4"]),
        ("gru", ["model", "recurrent", str(pico), "--set", "rnn_type=gru"]),
    ):
        assert (
            main(
                [
                    *words,
                    "--set",
                    "hidden_size=32",
                    "--set",
                    "num_hidden_layers=2",
                    "--set",
                    "max_position_embeddings=64",
                    "--out",
                    str(folder / name),
                    *workspace,
                ]
            )
            == 0
        )
    return folder


def command(made: Path, model: str, out: Path, *sets: str) -> list[str]:
    return [
        "train",
        "pretrain",
        str(made / model),
        str(made / "train-packed"),
        "--eval-data",
        str(made / "test-packed"),
        *(w for s in sets for w in ("--set", s)),
        "--out",
        str(out),
        "--workspace",
        str(out.parent / "ws"),
        "--quiet",
    ]


def run(made: Path, model: str, out: Path, *sets: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert main(command(made, model, out, *sets)) == 0
    return json.loads((out / "manifest.json").read_text())["metrics"], [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


FAST = ("batch_size=4", "optimizer.learning_rate=0.01", "eval_steps=20", "sample_max_tokens=8")


@pytest.mark.parametrize("model", ["decoder", pytest.param("gru", marks=pytest.mark.slow)])
def test_learns_and_is_saved_as_what_it_was(model: str, made: Path, tmp_path: Path) -> None:
    counted = [
        "train",
        "ngram",
        str(made / "decoder"),
        str(made / "train-packed"),
        "--eval-data",
        str(made / "test-packed"),
        "--set",
        "order=1",
        "--out",
        str(tmp_path / "one"),
        "--workspace",
        str(tmp_path / "ws"),
        "--quiet",
    ]
    assert main(counted) == 0
    by_frequency = json.loads((tmp_path / "one" / "manifest.json").read_text())["metrics"]["bits_per_byte"]
    metrics, rows = run(made, model, tmp_path / "out", *FAST, "num_train_epochs=12")
    held_out = [row["bits_per_byte"] for row in rows if "bits_per_byte" in row]
    assert held_out[-1] < by_frequency - 0.2, (held_out, by_frequency)
    assert held_out[-1] < held_out[0]
    assert metrics["bits_per_byte"] == round(held_out[-1], 5)
    assert metrics["warnings"] == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(trained, LlamaForCausalLM) == (model == "decoder")
    steps = [row for row in rows if "loss" in row]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "data_seconds", "peak_memory"} <= set(steps[0])
    assert main(["verify", "--golden", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_large_step_is_its_parts(made: Path, tmp_path: Path) -> None:
    """Rows of a step have unlike numbers of labels; divided in any way they give the same step."""
    files = {}
    for parts in (1, 2, 4):
        run(
            made,
            "decoder",
            tmp_path / f"p{parts}",
            f"batch_size={8 // parts}",
            f"gradient_accumulation_steps={parts}",
            "sample_max_tokens=0",
            "optimizer.learning_rate=0.01",
        )
        files[parts] = load_file(tmp_path / f"p{parts}" / "model.safetensors")
    for name in files[1]:
        for parts in (2, 4):
            assert torch.allclose(files[1][name], files[parts][name], atol=3e-4), name


def test_a_row_of_texts_is_its_texts(made: Path) -> None:
    packed = PackedDataset(Dataset(made / "train-packed"))
    batch = PackedSteps(packed, 1, batch_size=len(packed), num_micro_batches=1, length=64, seed=0)[0][0]()
    assert int(batch.segments.max()) >= 1
    assert int(batch.segments.min()) == -1  # and padding
    for name in ("decoder", "gru"):
        model = load_trainable(made / name).train()
        together = float(packed_loss(model, batch).detach())
        apart = 0.0
        for row, segments in zip(batch.ids, batch.segments, strict=True):
            for text in range(int(segments.max()) + 1):
                ids = row[segments == text][None]
                apart += (
                    float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
                    if ids.shape[1] > 1
                    else 0.0
                )
        assert together == pytest.approx(apart, rel=1e-5)


def test_steps_follow_from_their_numbers(made: Path) -> None:
    packed = PackedDataset(Dataset(made / "train-packed"))
    steps = PackedSteps(packed, 40, batch_size=2, num_micro_batches=3, length=64, seed=1)
    each = len(packed) // 6
    first = list(itertools.chain.from_iterable(steps.get_row_indices(i) for i in range(each)))
    assert len(set(first)) == each * 6  # no row twice in a pass
    assert sorted(steps.get_row_indices(each)) != sorted(steps.get_row_indices(0))  # the next pass has another order
    assert steps.get_row_indices(each + 1) == PackedSteps(
        packed, 40, batch_size=6, num_micro_batches=1, length=64, seed=1
    ).get_row_indices(each + 1)
    assert [p().where for p in steps[3]] == [
        f"rows {', '.join(map(str, steps.get_row_indices(3)[i : i + 2]))}" for i in (0, 2, 4)
    ]


EVERY = ("batch_size=4", "num_train_epochs=3", "save_steps=7", "eval_steps=10", "ema_decay=0.9", "sample_max_tokens=4")


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "muon"))])
def test_killed_and_gone_on_is_not_interrupted(name: str, made: Path, tmp_path: Path) -> None:
    """SIGKILL of the process between two checkpoints: weights and metrics are those of the run that was left alone, bit
    for bit.
    """
    sets = (*EVERY, f"optimizer.name={name}", "optimizer.learning_rate=0.003")
    whole, rows = run(made, "decoder", tmp_path / "whole", *sets)
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    words = [sys.executable, "-m", "llmworks.cli", *command(made, "decoder", out, *sets)]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "LLMWORKS_THREADS": "1"}
    )
    for _ in range(6000):
        if list(out.parent.glob("ws/scratch/*/checkpoints/step-000000014")):
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    metrics, resumed = run(made, "decoder", out, *sets)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    pick = ("step", "loss", "grad_norm", "learning_rate", "bits_per_byte")
    assert [[row.get(k) for k in pick] for row in rows] == [[row.get(k) for k in pick] for row in resumed]
    assert metrics["bits_per_byte"] == whole["bits_per_byte"]


@pytest.mark.parametrize(("decay", "moved"), [(0.05, 0.95), (0.75, 0.9)])
def test_the_average_is_what_is_saved(decay: float, moved: float, made: Path, tmp_path: Path) -> None:
    """One step moves the last weights by d; the mean by one minus the decay of it, which is a tenth in the first step
    where it is more.
    """
    start = load_file(made / "decoder" / "model.safetensors")
    one = ("batch_size=4", "num_train_tokens=1", "sample_max_tokens=0", "optimizer.warmup_ratio=0")
    run(made, "decoder", tmp_path / "last", *one, "sample_prompts=[]", "sample_max_tokens=5")
    run(made, "decoder", tmp_path / "mean", *one, f"ema_decay={decay}")
    last, mean = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "mean"))
    for name, weight in start.items():
        assert torch.allclose(mean[name] - weight, (last[name] - weight) * moved, atol=1e-6), name
    assert any(not torch.equal(last[name], weight) for name, weight in start.items())


def test_recomputing_changes_nothing(made: Path, tmp_path: Path) -> None:
    for name, sets in (("kept", ()), ("again", ("gradient_checkpointing=true",))):
        run(made, "decoder", tmp_path / name, "batch_size=4", "sample_max_tokens=0", *sets)
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "again"))
    for name in kept:
        assert torch.allclose(kept[name], again[name], atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision: str, made: Path, tmp_path: Path) -> None:
    """fp16 scales its loss; the scale may skip a first step, whose gradients were infinite, and no other."""
    _, full = run(made, "decoder", tmp_path / "full", "batch_size=4", "sample_max_tokens=0")
    _, half = run(made, "decoder", tmp_path / "half", "batch_size=4", "sample_max_tokens=0", f"precision={precision}")
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (full, half)]
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.05
    assert load_model(tmp_path / "half").dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_is_the_same(made: Path, tmp_path: Path) -> None:
    for name, sets in (("eager", ()), ("compiled", ("torch_compile=true",))):
        run(made, "decoder", tmp_path / name, "batch_size=4", "sample_max_tokens=0", *sets)
    eager, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name in eager:
        assert torch.allclose(eager[name], compiled[name], atol=1e-4), name


def test_mistakes(made: Path, pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = ["--workspace", str(tmp_path / "ws"), "--quiet"]
    assert (
        main(
            [
                "model",
                "new",
                str(pico),
                "--set",
                "hidden_size=32",
                "--set",
                "num_attention_heads=4",
                "--set",
                "num_hidden_layers=1",
                "--set",
                "max_position_embeddings=32",
                "--out",
                str(tmp_path / "short"),
                *workspace,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "tokenize",
                "train",
                str(made / "train-read"),
                "--set",
                "vocab_size=280",
                "--out",
                str(tmp_path / "other"),
                *workspace,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "data",
                "pack",
                str(tmp_path / "other"),
                str(made / "train-read"),
                "--set",
                "max_length=64",
                "--out",
                str(tmp_path / "others"),
                *workspace,
            ]
        )
        == 0
    )
    assert (
        main(["train", "ngram", str(pico), str(made / "train-packed"), "--out", str(tmp_path / "ngram"), *workspace])
        == 0
    )
    capsys.readouterr()
    decoder, data = str(made / "decoder"), str(made / "train-packed")
    for words, says in (
        (
            [decoder, data, "--set", "batch_size=5000"],
            "a step needs 5,000 (batch_size 5000, gradient_accumulation_steps 1)",
        ),
        ([str(tmp_path / "short"), data], "has rows of 64 tokens"),
        ([decoder, str(tmp_path / "others")], "packed with another tokenizer"),
        ([str(tmp_path / "ngram"), data], "has no trainable weights"),
        ([decoder, str(made / "train-read")], "no shards of packed tokens"),
        (
            [decoder, data, "--set", "num_train_tokens=100", "--set", "num_train_epochs=2"],
            "num_train_tokens and num_train_epochs are both set",
        ),
        ([decoder, data, "--set", "optimizer.lr_scheduler_type=wsd", "--set", "optimizer.decay_ratio=1"], "exceeds 1"),
        ([str(made / "gru"), data, "--set", "gradient_checkpointing=true"], "does not support it"),
        ([decoder, data, "--set", "optimizer.name=adam"], "'adamw'"),
    ):
        assert main(["train", "pretrain", *words, "--out", str(tmp_path / "o"), *workspace]) == 2, words
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
    assert (
        main(
            [
                *command(
                    made,
                    "decoder",
                    tmp_path / "x" / "o",
                    "batch_size=4",
                    "optimizer.learning_rate=1e30",
                    "sample_max_tokens=0",
                )
            ]
        )
        == 1
    )
    told = capsys.readouterr().err
    assert "the loss is" in told
    assert "(rows " in told
    assert not (tmp_path / "x" / "o").exists()


def test_worse_than_a_guess_is_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        made,
        "decoder",
        tmp_path / "out",
        "batch_size=4",
        "num_train_epochs=1",
        "sample_max_tokens=0",
        "loss_spike_threshold=0",
        "optimizer.learning_rate=5.0",
        "optimizer.warmup_ratio=0",
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["warnings"]
    assert any(
        "worse than uniform guessing" in text
        for text in json.loads((tmp_path / "out" / "report" / "report.json").read_text())["warnings"]
    )
