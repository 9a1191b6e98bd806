"""The self-test finds each fault that it looks for, in what really runs, and passes what is right for every kind of
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.planted import wrong_learning, wrong_parts, wrong_resume

from llmworks.cli import main
from llmworks.data.store.packed_tokens import PackedRow
from llmworks.model.nn import decoder
from llmworks.model.shape import Experts, RecurrentShape, Shape
from llmworks.train.loop import packed_steps
from llmworks.train.pretrain import PretrainConfig, PretrainOptimizer
from llmworks.train.selftest import pretrain as selftest

CONFIG = PretrainConfig(batch_size=2, gradient_accumulation_steps=2, optimizer=PretrainOptimizer(learning_rate=0.003))
SHAPE = Shape(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024
)


OTHERS = (
    Shape(norm="layer", position_embedding_type="learned", gated_mlp=False, bias="all"),
    RecurrentShape(rnn_type="mlp", window_size=4),
)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in (
                RecurrentShape(rnn_type="lstm", num_hidden_layers=2),
                Shape(
                    hidden_size=64,
                    num_attention_heads=8,
                    num_key_value_heads=1,
                    num_hidden_layers=4,
                    position_embedding_type="alibi",
                    sliding_window=512,
                    global_attn_every_n_layers=2,
                    experts=Experts(),
                ),
                *OTHERS,
            )
        ),
    ],
)
def test_what_is_right_passes(shape: Any) -> None:
    checks = list(selftest.selftest_pretrain(CONFIG, shape))
    assert len(checks) == 7
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    "more",
    [
        {
            "gradient_checkpointing": True,
            "ema_decay": 0.9,
            "optimizer": PretrainOptimizer(name="muon", lr_scheduler_type="wsd", decay_ratio=0.3),
        },
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in ({"precision": "bf16"}, {"optimizer": PretrainOptimizer(name="lion", learning_rate=1e-4)})
        ),
    ],
)
def test_every_habit_passes(more: dict[str, Any]) -> None:
    checks = list(
        selftest.selftest_pretrain(
            PretrainConfig.model_validate(
                {
                    **CONFIG.model_dump(),
                    **{k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in more.items()},
                }
            ),
            SHAPE,
        )
    )
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def bench(tmp_path: Path, config: PretrainConfig = CONFIG) -> selftest._PretrainBench:
    return selftest._PretrainBench(tmp_path, selftest.shrink_shape(SHAPE), selftest.reduce_config(config), None)


def wrong_segments(patch: pytest.MonkeyPatch) -> None:
    real = decoder.build_attention_mask
    patch.setattr(decoder, "build_attention_mask", lambda *a, **k: real(*a, **{**k, "segments": None}))


def wrong_labels(patch: pytest.MonkeyPatch) -> None:
    real = packed_steps.collate_packed

    def cut(rows: Any, length: int) -> Any:
        found = real(rows, length)
        found["learned"][:, 3:6] = False
        return found

    patch.setattr(packed_steps, "collate_packed", cut)


def wrong_seed(patch: pytest.MonkeyPatch) -> None:
    real = packed_steps._permute_rows
    patch.setattr(packed_steps, "_permute_rows", lambda rows, seed, epoch: real(rows, 0, epoch))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[..., tuple[bool, str]]]] = {
    "texts see one another": (wrong_segments, selftest._check_document_isolation),
    "parts weigh alike": (wrong_parts, lambda b: selftest._check_accumulation(b, selftest.EXACT)),
    "labels are lost": (wrong_labels, selftest._check_labels),
    "the seed is not used": (wrong_seed, selftest.check_seed),
    "moments are lost": (wrong_resume, selftest.check_resume),
    "nothing is learned": (wrong_learning, selftest._check_memorization),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, check = FAULTS[name]
    fault(monkeypatch)
    holds, detail = check(bench(tmp_path))
    assert not holds, detail


def test_a_key_that_nothing_reads_is_named(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"optimizer": PretrainOptimizer(lr_scheduler_type="cosine", decay_ratio=0.5)})
    holds, detail = selftest._check_fields_read(bench(tmp_path, config), config)
    assert not holds
    assert detail == "set, but not read by this training: optimizer.decay_ratio"


def test_a_training_that_does_not_run_says_so_once() -> None:
    found = list(
        selftest.selftest_pretrain(
            CONFIG.model_copy(update={"gradient_checkpointing": True}), RecurrentShape(rnn_type="lstm")
        )
    )
    assert [check.passed for check in found] == [False] * 7
    assert "gradient_checkpointing" in found[0].detail
    assert {check.detail for check in found[1:]} == {"skipped"}


@pytest.mark.slow
def test_what_dropout_draws_is_not_compared() -> None:
    assert all(
        check.passed for check in selftest.selftest_pretrain(CONFIG, RecurrentShape(rnn_type="lstm", dropout=0.3))
    )


def test_rows_of_the_data_are_taken(tmp_path: Path) -> None:
    import numpy as np

    made = bench(tmp_path)
    ids = np.arange(1000, 1100)
    row = PackedRow(ids, np.arange(100) > 0, np.arange(100), np.repeat([0, 1], [30, 70]), np.array([0, 1]))
    data = made.write_packed("own", [row] * 2)
    first, second = selftest._take_rows(data, 2)
    assert torch.equal(torch.from_numpy(first.ids), torch.arange(1000, 1064) % selftest.VOCABULARY)
    assert second.segment_ids.tolist() == [0] * 30 + [1] * 34


RECIPE = """
name: tiny
steps:
  text: {use: "path:FOLDER"}
  read: {stage: data.read, inputs: {data: text}}
  tokenizer: {stage: tokenize.train, inputs: {data: read}, config: {vocab_size: 300}}
  packed: {stage: data.pack, inputs: {model: tokenizer, data: read}, config: {max_length: 32}}
  new:
    stage: model.new
    inputs: {tokenizer: tokenizer}
    config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}
  trained:
    stage: train.pretrain
    inputs: {model: new, data: packed}
    config: {batch_size: 2, DECAYsample_max_tokens: 4}
"""


@pytest.mark.slow
def test_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(f"Row {i} of words, and {i * 7} more. " for i in range(300)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path / "text")).replace("DECAY", ""))
    assert main(["train", "selftest", str(recipe), "--workspace", str(tmp_path / "ws")]) == 0
    told = capsys.readouterr().out
    assert told.count("✓") == 7
    assert "random rows" in told
    assert main(["run", str(recipe), "--workspace", str(tmp_path / "ws"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "selftest", str(recipe), "trained", "--json", "--workspace", str(tmp_path / "ws")]) == 0
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out)["trained"])
    changed = RECIPE.replace("FOLDER", str(tmp_path / "text")).replace("DECAY", "optimizer: {decay_ratio: 0.4}, ")
    recipe.write_text(changed)
    assert main(["train", "selftest", str(recipe), "--workspace", str(tmp_path / "ws")]) == 1
    assert (
        "the first is trained: every config field is read: set, but not read by this training: optimizer.decay_ratio"
        in capsys.readouterr().err
    )
    for words, says in ((["nothing"], "'nothing' is not a training"), (["--set", "trained.batsch=3"], "batsch")):
        assert main(["train", "selftest", str(recipe), *words, "--workspace", str(tmp_path / "ws")]) == 2
        assert says in capsys.readouterr().err
