"""Training invariants: accumulation is the batch, padding is nothing, resuming is not interrupting, the loss is
transformers' own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmworks.core.errors import TrainingError
from llmworks.core.progress import Progress
from llmworks.model.io.load import load_model
from llmworks.model.lora import adapter_io as adapter
from llmworks.model.lora import lora
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape
from llmworks.train.finetune.examples import Example, PaddedBatch, collate, plan_epoch
from llmworks.train.loop.loop import LoopConfig, train
from llmworks.train.loop.losses import next_token_loss
from llmworks.train.loop.schedule import OptimizerConfig, learning_rate

EXAMPLES = [
    Example(
        tuple(3 + (i * 7 + j * 3) % 300 for j in range(4 + 3 * i)), tuple(int(j >= 2 + i) for j in range(4 + 3 * i))
    )
    for i in range(8)
]
CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1)


def prepared(pico: Path) -> torch.nn.Module:
    model = load_model(pico)
    torch.manual_seed(0)
    lora.attach_lora(model, "all-linear", lora.LoraSettings(4, 8.0, dropout=0.1))
    return model


def steps_of(groups: list[list[list[int]]]) -> list[list[Callable[[], PaddedBatch]]]:
    return [[lambda part=part: collate([EXAMPLES[i] for i in part]) for part in parts] for parts in groups]  # type: ignore[misc]


def run(
    pico: Path, scratch: Path, groups: list[list[list[int]]], config: OptimizerConfig = CONFIG, every: int = 1000
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    scratch.mkdir(exist_ok=True)
    model = prepared(pico)
    progress = Progress(scratch / "metrics.jsonl", quiet=True)
    train(model, steps_of(groups), next_token_loss, config, LoopConfig(every), scratch=scratch, progress=progress)
    return adapter.get_adapter_state(model), progress.read_metrics()


def test_loss_of_an_own_model_is_the_sum_over_its_labels() -> None:
    torch.manual_seed(0)
    model = DecoderForCausalLM(
        DecoderConfig(
            shape=Shape(vocab_size=320, hidden_size=32, num_attention_heads=2, num_hidden_layers=1).model_dump()
        )
    )
    batch = collate(EXAMPLES)
    logits = model(input_ids=batch.ids).logits[batch.rows, batch.columns - 1].float()
    wanted = torch.nn.functional.cross_entropy(logits, batch.ids[batch.rows, batch.columns], reduction="sum")
    torch.testing.assert_close(next_token_loss(model, batch), wanted)


def test_loss_is_that_of_transformers(pico: Path) -> None:
    model = load_model(pico)
    batch = collate(EXAMPLES)
    labels = torch.full_like(batch.ids, -100)
    labels[batch.rows, batch.columns] = batch.ids[batch.rows, batch.columns]
    attention = torch.tensor([[1] * len(e.ids) + [0] * (batch.ids.shape[1] - len(e.ids)) for e in EXAMPLES])
    theirs = model(input_ids=batch.ids, attention_mask=attention, labels=labels).loss
    assert float(next_token_loss(model, batch).detach() / batch.labels) == pytest.approx(
        float(theirs.detach()), rel=1e-5
    )


def test_padding_and_batching_change_nothing(pico: Path) -> None:
    model = load_model(pico)
    together = float(next_token_loss(model, collate(EXAMPLES)).detach())
    assert sum(float(next_token_loss(model, collate([e])).detach()) for e in EXAMPLES) == pytest.approx(
        together, rel=1e-5
    )


def test_first_token_is_never_a_label() -> None:
    batch = collate([Example((5, 6, 7), (1, 1, 1))])
    assert batch.columns.tolist() == [1, 2]


def test_accumulated_steps_equal_the_large_batch(pico: Path, tmp_path: Path) -> None:
    def trained(name: str, groups: list[list[list[int]]]) -> dict[str, torch.Tensor]:
        model = load_model(pico)
        torch.manual_seed(0)
        lora.attach_lora(model, "all-linear", lora.LoraSettings(4, 8.0))
        (tmp_path / name).mkdir()
        train(
            model,
            steps_of(groups),
            next_token_loss,
            CONFIG,
            LoopConfig(99),
            scratch=tmp_path / name,
            progress=Progress(quiet=True),
        )
        return adapter.get_adapter_state(model)

    whole, parts = trained("a", [[[0, 1, 2, 3, 4, 5, 6, 7]]] * 3), trained("b", [[[7], [0, 1], [2, 3, 4], [5, 6]]] * 3)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=2e-4), name


def test_resume_is_no_interruption_bit_for_bit(pico: Path, tmp_path: Path) -> None:
    groups = [[[i % 8, (i + 3) % 8]] for i in range(10)]
    whole, rows = run(pico, tmp_path / "whole", groups)

    class Killed(Exception):
        pass

    made = 0

    def dying(part: list[int]) -> PaddedBatch:
        nonlocal made
        made += 1
        if made == 8:
            raise Killed
        return collate([EXAMPLES[i] for i in part])

    scratch = tmp_path / "broken"
    scratch.mkdir()
    progress = Progress(scratch / "metrics.jsonl", quiet=True)
    with pytest.raises(Killed):
        train(
            prepared(pico),
            [[lambda p=parts[0]: dying(p)] for parts in groups],
            next_token_loss,
            CONFIG,
            LoopConfig(3),
            scratch=scratch,
            progress=progress,  # type: ignore[misc]
        )
    assert len(progress.read_metrics()) == 7
    torch.manual_seed(99)  # a new process would not have the old random state
    resumed, resumed_rows = run(pico, scratch, groups)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert [(r["step"], r["loss"]) for r in resumed_rows] == [(r["step"], r["loss"]) for r in rows]


def test_loss_falls(pico: Path, tmp_path: Path) -> None:
    _, rows = run(pico, tmp_path / "s", [[[0, 1, 2, 3, 4, 5, 6, 7]]] * 30)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_loss_that_is_no_number_stops(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ of 20: the loss is (nan|inf).*learning_rate"):
        run(pico, tmp_path / "s", [[[0, 1]]] * 20, OptimizerConfig(learning_rate=1e30))


def test_learning_rate_schedule() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(s, 100, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.001)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_epoch_holds_every_example_once_in_batches_of_like_length() -> None:
    lengths = [(i * 37) % 101 for i in range(203)]
    batches = plan_epoch(lengths, 4, seed=3)
    assert sorted(i for b in batches for i in b) == list(range(203))
    assert batches == plan_epoch(lengths, 4, seed=3) != plan_epoch(lengths, 4, seed=4)
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 15  # random batches of four spread over about 60


def test_metrics_file_is_json_lines(pico: Path, tmp_path: Path) -> None:
    run(pico, tmp_path / "s", [[[0, 1]]] * 2)
    rows = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "num_label_tokens", "seconds"} <= set(rows[0])
