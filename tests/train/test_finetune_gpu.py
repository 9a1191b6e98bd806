"""Fine-tuning on a GPU: the recipe that runs on a CPU, to the same losses but for bf16; what only a GPU has.

Its arithmetic under autocast is tried on a CPU, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.test_sft import Run, chats, run

from llmworks.model.io.load import load_model
from llmworks.train.distributed.sharding import resolve_precision

__all__ = ["run"]
WAYS: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "4 bits": {"lora": {"load_in_4bit": True}},
    "magnitudes": {"lora": {"use_dora": True}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "all weights": {"method": "full"},
    "recompute": {"gradient_checkpointing": True},
    "noise": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize(
    "what",
    [
        what if what in ("an adapter", "4 bits", "all weights") else pytest.param(what, marks=pytest.mark.slow)
        for what in WAYS
    ],
)
def test_half_precision_is_near(what: str, run: Run, tmp_path: Path) -> None:
    """bf16 under autocast, which is what `auto` is on a GPU, against fp32: losses of all steps, looks, and the result's
    golden tokens.
    """
    found = {}
    for precision in ("fp32", "bf16"):
        made, data = run(
            precision,
            held_out=chats(tmp_path / "unseen", 6),
            precision=precision,
            num_train_epochs=1.0,
            eval_steps=3,
            **WAYS[what],
        )
        assert made.golden is not None
        found[precision] = [(row["loss"], row.get("eval_loss", 0.0)) for row in data["rows"] if "loss" in row]
    for exact, half in zip(found["fp32"], found["bf16"], strict=True):
        assert half == pytest.approx(exact, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("what", [*WAYS, "moments in 8 bits"])
def test_a_gpu_trains_what_a_cpu_trains(what: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration without a word about the device; losses of a CPU in fp32 beside those of the GPU in what it
    has.
    """
    config = WAYS.get(what, {"optimizer": {"name": "adamw_8bit"}})
    held_out = chats(tmp_path / "unseen", 6)
    made, data = run("gpu", held_out=held_out, num_train_epochs=1.0, eval_steps=3, **config)
    assert resolve_precision("auto", torch.device("cuda", 0)) != "fp32"
    assert made.golden is not None
    plain = config if what in WAYS else {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, exact = run("cpu", held_out=held_out, num_train_epochs=1.0, eval_steps=3, **plain)
    for here, there in zip(
        (row["loss"] for row in data["rows"] if "loss" in row),
        (row["loss"] for row in exact["rows"] if "loss" in row),
        strict=True,
    ):
        assert here == pytest.approx(there, rel=0.1 if what in ("dropout", "noise") else 0.05)


@pytest.mark.gpu
def test_the_result_is_where_an_engine_reads_it(run: Run) -> None:
    made, _ = run("all", method="full", num_train_epochs=1.0)
    assert {p.device.type for p in load_model(made.path).parameters()} == {"cpu"}
