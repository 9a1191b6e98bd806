"""Optimizers against their papers' algorithms, schedules at their corners, and a watch that stops what goes wrong."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from llmworks.core.errors import MissingDependency, TrainingError
from llmworks.core.progress import Progress
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape
from llmworks.train.loop import checkpoints
from llmworks.train.loop.loop import LoopConfig, train
from llmworks.train.loop.loss_guard import LossGuard
from llmworks.train.loop.optimizers import create_optimizers, find_linear_weights
from llmworks.train.loop.schedule import OptimizerConfig, learning_rate


class Two(nn.Module):
    """A matrix, a gain, and a loss of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        return (self.layer(x) - x.sum()).square().mean()


def stepped(config: OptimizerConfig, steps: int = 4) -> dict[str, torch.Tensor]:
    model = Two()
    optimizers = create_optimizers(model, config)
    for step in range(steps):
        model.loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_lion_by_its_paper() -> None:
    """Algorithm 2 of arXiv:2302.06675, number by number; decay is the matrix's alone."""
    made = stepped(OptimizerConfig(name="lion", learning_rate=0.01, beta1=0.9, beta2=0.99, weight_decay=0.5))
    model = Two()
    moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(4):
        grads = torch.autograd.grad(model.loss(step), list(model.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                update = (0.9 * moments[name] + 0.1 * g).sign()
                p -= 0.01 * (update + (0.5 * p if p.dim() == 2 else 0))
                moments[name] = 0.99 * moments[name] + 0.01 * g
    for name, p in model.named_parameters():
        assert torch.allclose(made[name], p, atol=1e-6)


def test_adamw_decays_matrices_only() -> None:
    made = stepped(OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.5))
    model = Two()
    reference = torch.optim.AdamW(
        [{"params": [model.layer.weight], "weight_decay": 0.5}, {"params": [model.layer.bias], "weight_decay": 0.0}],
        lr=0.01,
    )
    for step in range(4):
        model.loss(step).backward()
        reference.step()
        reference.zero_grad()
    for name, p in model.named_parameters():
        assert torch.allclose(made[name], p, atol=1e-6)


def test_muon_turns_inner_matrices_only() -> None:
    """A step of a matrix is near orthogonal: its singular values are about the same, as far as the gradient has
    directions.

    Embedding, head and gains are AdamW's.
    """
    shape = Shape(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=False)  # type: ignore[call-arg]
    model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    inner = find_linear_weights(model)
    names = {name for name, p in model.named_parameters() if id(p) in inner}
    assert names == {
        f"decoder.blocks.0.{part}.weight"
        for part in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.out",
            "feed_forward.gate",
            "feed_forward.up",
            "feed_forward.down",
        )
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon, adamw = create_optimizers(model, OptimizerConfig(name="muon", learning_rate=0.01))
    assert isinstance(muon, torch.optim.Muon)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in (muon, adamw):
        optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith("attention.out.weight"):
            values = torch.linalg.svdvals(p.detach() - before[name])
            assert values[0] / values[int(len(values) * 0.4)] < 2.5
        assert not torch.equal(p, before[name])


def test_eight_bits_need_a_gpu() -> None:
    with pytest.raises(MissingDependency, match="adamw_8bit needs"):
        create_optimizers(Two(), OptimizerConfig(name="adamw_8bit"))


def test_schedules() -> None:
    def rates(**more: object) -> list[float]:
        config = OptimizerConfig.model_validate(
            {"learning_rate": 1.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.1, **more}
        )
        return [learning_rate(step, 100, config) for step in range(100)]

    wsd = rates(lr_scheduler_type="wsd", decay_ratio=0.2)
    assert wsd[9:81] == [1.0] * 72
    assert wsd[90] == pytest.approx(0.55)
    assert wsd[99] == pytest.approx(0.1 + 0.9 / 20)
    assert rates(lr_scheduler_type="constant")[10:] == [1.0] * 90
    linear = rates(lr_scheduler_type="linear")
    assert linear[55] == pytest.approx(0.55)
    steps = {round(a - b, 9) for a, b in itertools.pairwise(linear[10:])}
    assert steps == {0.01}
    for all_rates in (wsd, linear, rates(lr_scheduler_type="cosine")):
        assert all_rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_jumps_and_numbers_that_are_none_stop() -> None:
    watch = LossGuard(threshold=1.0)
    for step in range(30):
        watch.check(step, 100, 3.0 + 0.01 * (step % 3), 1.0, "rows 1, 2")
    watch.check(30, 100, 3.9, 1.0, "rows 3, 4")
    with pytest.raises(
        TrainingError,
        match=r"step 32 of 100 \(rows 7, 9\): the loss is 4\.500, 1\.490 above the median of the last 31 steps",
    ):
        watch.check(31, 100, 4.5, 1.0, "rows 7, 9")
    early = LossGuard(threshold=1.0)
    for step, loss in enumerate((7.0, 9.0, 10.0)):  # too early for a median
        early.check(step, 9, loss, 1.0, "")
    with pytest.raises(TrainingError, match=r"the loss is 10\.100, the first one was 7\.000"):
        early.check(3, 9, 10.1, 1.0, "")
    LossGuard(threshold=0.0, previous_losses=[1.0] * 50).check(0, 9, 99.0, 1.0, "")
    with pytest.raises(TrainingError, match=r"step 1 of 9: the loss is nan"):
        LossGuard().check(0, 9, float("nan"), 1.0, "")
    with pytest.raises(TrainingError, match="the gradient norm is inf"):
        LossGuard().check(0, 9, 1.0, float("inf"), "")
    LossGuard().check(0, 9, 1.0, float("inf"), "", scaled=True)


def test_a_step_without_labels_is_told(tmp_path: Path) -> None:
    class Nothing:
        labels, tokens = 0, 5

    with pytest.raises(TrainingError, match="no trainable tokens"):
        train(
            Two(),
            [[Nothing]],
            lambda model, batch: model.loss(0),
            OptimizerConfig(),
            LoopConfig(1),
            scratch=tmp_path,
            progress=Progress(quiet=True),
        )


def running(model: nn.Module) -> checkpoints.TrainingState:
    parameters = dict(model.named_parameters())
    return checkpoints.TrainingState(parameters, create_optimizers(model, OptimizerConfig()), {})


def test_checkpoints_rotate_and_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    run = running(model)
    for step in (10, 20, 30):
        with torch.no_grad():
            model.layer.weight.fill_(step)
        checkpoints.save(run, step, tmp_path, save_total_limit=2)
    assert [file.name for file in checkpoints.list_checkpoints(tmp_path)] == ["step-000000020", "step-000000030"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(run, 40, tmp_path, save_total_limit=2)
    assert sorted((tmp_path / checkpoints.FOLDER).iterdir()) == checkpoints.list_checkpoints(
        tmp_path
    )  # and no half of one
    again = Two()
    assert checkpoints.resume(running(again), tmp_path) == 30
    assert torch.equal(again.layer.weight, torch.full((4, 3), 30.0))
    with pytest.raises(TrainingError, match=r"another configuration \(layer\.weight differs\)"):
        checkpoints.resume(running(nn.ModuleDict({"layer": nn.Linear(2, 4)})), tmp_path)
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    part = newest / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(TrainingError, match="delete it to resume from the previous one"):
        checkpoints.resume(running(Two()), tmp_path)
    shutil.rmtree(newest)
    assert checkpoints.resume(running(Two()), tmp_path) == 20
    assert LoopConfig(1).save_total_limit == 2
