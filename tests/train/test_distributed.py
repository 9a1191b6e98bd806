"""Spread over processes, a training is what it is in one: losses, weights, and checkpoints that another number of
processes reads.

A lost process ends all.
"""

from __future__ import annotations

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

from llmworks.cli import main
from llmworks.core.errors import UserError
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape
from llmworks.train.distributed.config import ParallelConfig, get_micro_batch_rows
from llmworks.train.distributed.pipeline import PipelinedModel
from llmworks.train.distributed.sharding import distribute_model
from llmworks.train.distributed.world import World

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
STEPS = (
    "batch_size=2",
    "gradient_accumulation_steps=4",
    "num_train_epochs=2",
    "optimizer.learning_rate=0.001",
    "optimizer.warmup_ratio=0.2",
    "eval_steps=8",
    "eval_samples=8",
    "sample_max_tokens=4",
    "save_steps=5",
)


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed tokens and an untrained decoder whose heads and layers can be divided."""
    folder = tmp_path_factory.mktemp("distributed")
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
    sets = [
        word
        for s in (
            "hidden_size=32",
            "num_attention_heads=4",
            "num_key_value_heads=2",
            "num_hidden_layers=3",
            "max_position_embeddings=64",
            "use_qk_norm=true",
        )
        for word in ("--set", s)
    ]
    assert main(["model", "new", str(pico), *sets, "--out", str(folder / "decoder"), *workspace]) == 0
    assert (
        main(
            [
                "model",
                "recurrent",
                str(pico),
                "--set",
                "rnn_type=gru",
                "--set",
                "hidden_size=32",
                "--set",
                "max_position_embeddings=64",
                "--out",
                str(folder / "gru"),
                *workspace,
            ]
        )
        == 0
    )
    return folder


def words(made: Path, out: Path, *more: str, model: str = "decoder") -> list[str]:
    sets = [word for s in (*STEPS, *(m for m in more if "=" in m)) for word in ("--set", s)]
    rest = [m for m in more if "=" not in m]
    return [
        "train",
        "pretrain",
        str(made / model),
        str(made / "train-packed"),
        "--eval-data",
        str(made / "test-packed"),
        *sets,
        *rest,
        "--out",
        str(out),
        "--workspace",
        str(out.parent / "ws"),
        "--quiet",
    ]


@pytest.fixture(scope="module")
def alone(made: Path) -> Path:
    """The same training in one process."""
    assert main(words(made, made / "alone" / "out")) == 0
    return made / "alone" / "out"


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(out: Path, alone: Path) -> None:
    """Losses, norms and figures of each step, tokens, and the weights at the end.

    Where gradients are nearly nothing, Adam makes a step of their rounding, so norms drift.
    """
    ours, theirs = rows(out), rows(alone)
    assert [(r["step"], r.get("tokens"), r.get("num_label_tokens")) for r in ours] == [
        (r["step"], r.get("tokens"), r.get("num_label_tokens")) for r in theirs
    ]
    for name, within in (
        ("loss", 2e-4),
        ("grad_norm", 0.02),
        ("learning_rate", 1e-12),
        ("eval_loss", 2e-4),
        ("bits_per_byte", 2e-4),
    ):
        assert [r[name] for r in ours if name in r] == pytest.approx(
            [r[name] for r in theirs if name in r], rel=within
        ), name
    assert [r["grad_norm"] for r in ours[:2]] == pytest.approx([r["grad_norm"] for r in theirs[:2]], rel=2e-5)
    a, b = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-3), name


LAYOUTS = {
    "replicated": ("2", ()),
    "sharded": ("2", ("parallel.data_parallel=fsdp",)),
    "tensor": ("2", ("parallel.tensor_parallel_size=2",)),
    "pipeline": ("2", ("parallel.pipeline_parallel_size=2",)),
    "sharded and tensor": ("4", ("parallel.data_parallel=fsdp", "parallel.tensor_parallel_size=2")),
    "sharded and pipeline": ("4", ("parallel.data_parallel=fsdp", "parallel.pipeline_parallel_size=2")),
    "replicated and pipeline": ("4", ("parallel.pipeline_parallel_size=2",)),
}


TUNED = {
    "adapter": ("lora.r=4",),
    "adapter of four bits": ("lora.load_in_4bit=true", "lora.r=4"),
    "all weights": ("method=full",),
    "sharded adapter": ("lora.r=4", "parallel.data_parallel=fsdp"),
    "sharded weights": ("method=full", "parallel.data_parallel=fsdp"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TUNED)
def test_a_fine_tuning_is_the_same_in_two_processes(what: str, made: Path, pico: Path, tmp_path: Path) -> None:
    from tests.train.test_sft import chats

    chats(tmp_path / "chats", 24)
    alone = [s for s in TUNED[what] if not s.startswith("parallel")]
    sets = (
        "batch_size=2",
        "gradient_accumulation_steps=2",
        "optimizer.learning_rate=0.005",
        "save_steps=4",
        "eval_steps=4",
        "num_sample_prompts=0",
    )
    for name, more in (("one", alone), ("two", [*TUNED[what], "--nproc", "2"])):
        words = [
            "train",
            "sft",
            str(pico),
            str(tmp_path / "chats"),
            "--eval-data",
            str(tmp_path / "chats"),
            "--out",
            str(tmp_path / name),
            "--workspace",
            str(tmp_path / f"ws-{name}"),
            "--quiet",
        ]
        assert (
            main(
                [
                    *words,
                    *(w for s in (*sets, *(m for m in more if "=" in m)) for w in ("--set", s)),
                    *(m for m in more if "=" not in m),
                ]
            )
            == 0
        )
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [(r["step"], r.get("tokens"), r.get("num_label_tokens")) for r in one] == [
        (r["step"], r.get("tokens"), r.get("num_label_tokens")) for r in two
    ]
    for name in ("loss", "eval_loss"):
        assert [r[name] for r in one if name in r] == pytest.approx([r[name] for r in two if name in r], rel=2e-3), name
    assert [r["grad_norm"] for r in one[:2]] == pytest.approx([r["grad_norm"] for r in two[:2]], rel=1e-3)
    file = (
        "adapter_model.safetensors"
        if (tmp_path / "one" / "adapter_model.safetensors").exists()
        else "model.safetensors"
    )
    a, b = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=5e-3) for name in a)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[pytest.mark.slow] if LAYOUTS[name][0] == "4" or name != "sharded" else [])
        for name in LAYOUTS
    ],
)
def test_a_step_is_the_same_step(layout: str, made: Path, alone: Path, tmp_path: Path) -> None:
    processes, sets = LAYOUTS[layout]
    assert main(words(made, tmp_path / "out", *sets, "--nproc", processes)) == 0
    same(tmp_path / "out", alone)


@pytest.mark.slow
def test_checkpoints_are_read_by_another_number_of_processes(made: Path, alone: Path, tmp_path: Path) -> None:
    """Two sharded processes are killed; one goes on; it is killed; two pieces of a pipeline would be another
    configuration, two shards are not.
    """
    out = tmp_path / "out"
    sets = words(made, out, "parallel.data_parallel=fsdp")
    seen = kill_when(sets, "2", out, "step-000000005", victim=None)
    assert seen == -signal.SIGKILL
    assert main(sets) == 0  # in one process
    same(out, alone)
    steps = [r["step"] for r in rows(out) if "loss" in r]
    assert steps == list(range(len(steps)))


def kill_when(command: list[str], processes: str, out: Path, checkpoint: str, victim: int | None) -> int:
    """Start processes, wait for a checkpoint, kill all or one by its number; returns the launcher's exit code."""
    with (out.parent / "stderr").open("wb") as told:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "llmworks.cli", *command, "--nproc", processes],
            stdout=subprocess.DEVNULL,
            stderr=told,
            env={**os.environ, "LLMWORKS_THREADS": "1"},
            start_new_session=True,
        )
    for _ in range(6000):
        if list(out.parent.glob(f"ws/scratch/*/checkpoints/{checkpoint}")):
            break
        assert launcher.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    if victim is None:
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        os.kill(ranks(launcher.pid)[victim], signal.SIGKILL)
    return launcher.wait(60)


def ranks(launcher: int) -> dict[int, int]:
    """The processes that a launcher started, by their numbers."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
        )
        found[int(environment["RANK"])] = int(pid)
    return found


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_all_with_one_message(victim: int, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = words(made, out, "num_train_epochs=400")
    assert kill_when(command, "2", out, "step-000000005", victim) == 3
    told = (tmp_path / "stderr").read_text().strip()
    assert (
        told == f"llmworks: process {victim} of 2 was killed (signal 9); all are stopped. Run the same command again"
        " to resume from the last checkpoint"
    )
    assert not out.exists()


FAULT = """
import os
if os.environ.get("RANK") == "1":
    from llmworks.core.errors import DataError
    from llmworks.train.loop import packed_steps

    def broken(model, batch):
        raise DataError("shard-00003: cannot be read here")

    packed_steps.packed_loss = broken
"""


@pytest.mark.slow
def test_the_process_that_fails_is_named_not_those_that_miss_it(made: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LLMWORKS_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llmworks.cli", *words(made, tmp_path / "out"), "--nproc", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "process 1 of 2: llmworks: shard-00003: cannot be read here"


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmworks.cli", *words(made, tmp_path / "out", "--nproc", "2")]
    command.remove("--quiet")
    runs = [
        subprocess.Popen(
            [*command[:-4], "--out", str(tmp_path / name), *command[-2:]],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LLMWORKS_THREADS": "1"},
        )
        for name in ("one", "two")
    ]
    told = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("another run created it meanwhile" in text for text in told) == 1
    assert (tmp_path / "one" / "model.safetensors").samefile(tmp_path / "two" / "model.safetensors")


@pytest.mark.slow
def test_torchrun_starts_it_too(made: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "llmworks.cli",
            *words(made, out),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LLMWORKS_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result:") == 1  # of the first process alone
    same(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion", "muon"])
def test_other_optimizers_shard(name: str, made: Path, tmp_path: Path) -> None:
    """One step: a sign, or an orthogonal matrix, of a gradient that is spread over processes; Muon finds it in bf16."""
    more = (f"optimizer.name={name}", "num_train_tokens=512", "optimizer.learning_rate=0.0003", "num_train_epochs=1")
    for at, layout in (("alone", ()), ("spread", ("parallel.data_parallel=fsdp", "--nproc", "2"))):
        assert main(words(made, tmp_path / at, *more, *layout)) == 0
    a, b = (load_file(tmp_path / at / "model.safetensors") for at in ("alone", "spread"))
    start = load_file(made / "decoder" / "model.safetensors")
    for key, weight in a.items():
        moved, off = (weight - start[key]).norm(), (weight - b[key]).norm()
        assert off <= 0.05 * moved + 1e-6, (key, float(off / moved))


def test_a_recurrent_model_is_replicated(made: Path, tmp_path: Path) -> None:
    assert main(words(made, tmp_path / "one", model="gru")) == 0
    assert main(words(made, tmp_path / "two", "--nproc", "2", model="gru")) == 0
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_mistakes(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for more, says in (
        (("parallel.tensor_parallel_size=2",), "does not divide 1 process; launch with --nproc 2 or a multiple"),
        (
            ("batch_size=8", "gradient_accumulation_steps=1", "parallel.pipeline_parallel_size=2", "--nproc", "2"),
            "raise gradient_accumulation_steps",
        ),
        (("--nproc", "two"), "--nproc two: must be a positive integer"),
        (("--nproc", "²"), "--nproc ²: must be a positive integer"),
        (
            ("batch_size=6", "gradient_accumulation_steps=3", "parallel.pipeline_parallel_size=2", "--nproc", "4"),
            "a step has 9 rows per process, not divisible into micro-batches of 6",
        ),
    ):
        assert main(words(made, tmp_path / "o", *more)) == 2, more
        told = capfd.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1, told


def test_what_cannot_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="to fsdp"):
        ParallelConfig(tensor_parallel_size=2).get_data_parallel_size(4)
    assert (
        ParallelConfig(tensor_parallel_size=2, data_parallel="fsdp", pipeline_parallel_size=2).get_data_parallel_size(8)
        == 2
    )
    with pytest.raises(UserError, match="cannot be divided among 3 processes"):
        get_micro_batch_rows(8, 3, 4)
    assert [get_micro_batch_rows(8, 2, batch) for batch in (8, 4, 2)] == [4, 4, 2]
    monkeypatch.setattr(World, "get_axis_size", lambda self, axis: 4)
    world = World(torch.device("cpu"), size=4)
    for shape, parallel, precision, says in (
        (
            Shape(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3),
            ParallelConfig(tensor_parallel_size=4),
            "fp32",
            "parallel.tensor_parallel_size 4 does not divide the model's num_key_value_heads 2",
        ),
        (
            Shape(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, position_embedding_type="alibi"),
            ParallelConfig(tensor_parallel_size=4),
            "fp32",
            "ALiBi",
        ),
        (
            Shape(hidden_size=32, num_attention_heads=4, num_hidden_layers=3),
            ParallelConfig(data_parallel="fsdp"),
            "fp16",
            "use bf16",
        ),
    ):
        network = DecoderForCausalLM(DecoderConfig(shape=shape.model_copy(update={"vocab_size": 64}).model_dump()))
        with pytest.raises(UserError, match=says):
            distribute_model(network, parallel, world, precision=precision)
    with pytest.raises(UserError, match="only decoders can be sharded"):
        distribute_model(torch.nn.Linear(2, 2), ParallelConfig(data_parallel="fsdp"), world)
    with pytest.raises(UserError, match="4 exceeds the model's 3 layers"):
        PipelinedModel(network, ParallelConfig(pipeline_parallel_size=4), world)
