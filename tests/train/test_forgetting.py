"""What a training does to the rest of a model is measured, told, and can be gated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_pico
from torch.nn import functional as F

from llmworks import assets
from llmworks.data.store.rows import write_chat, write_preference
from llmworks.generate.engines.torch import TorchEngine
from llmworks.runtime.session import Session
from llmworks.train.forgetting.check import (
    TOP_K,
    Forgetting,
    _get_top,
    compute_kl,
    find_warnings,
    measure_forgetting,
    read_general_questions,
    record_reference,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the general texts by heart, so that it has something to forget."""
    path = make_pico(tmp_path_factory.mktemp("trained") / "pico")
    engine = TorchEngine.open(path)
    texts = (Path(assets.__file__).parents[1] / "train" / "forgetting" / "general_texts.txt").read_text("utf-8")
    rows = [torch.tensor([engine.tokenizer(text)["input_ids"]]) for text in texts.split("\n\n")]
    optimizer = torch.optim.Adam(engine.model.parameters(), lr=0.01)
    for _ in range(30):
        for row in rows:
            optimizer.zero_grad()
            engine.model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    engine.model.save_pretrained(path)
    return path


@pytest.mark.parametrize("vocabulary", [TOP_K // 2, TOP_K, 4000])
def test_divergence_against_torch(vocabulary: int) -> None:
    """Exact where all tokens are recorded; else that of the distribution whose rarer tokens are one event."""
    torch.manual_seed(0)
    before, after = (3 * torch.randn(5, vocabulary, dtype=torch.float64) for _ in range(2))
    found = compute_kl(*_get_top(before.numpy()), after.numpy())
    p, q = before.softmax(-1), after.softmax(-1)
    exact = (p * (p / q).log()).sum(-1)
    if vocabulary > TOP_K:
        top = p.topk(TOP_K).indices
        p, q = (torch.cat([one.gather(-1, top), 1 - one.gather(-1, top).sum(-1, keepdim=True)], -1) for one in (p, q))
    grouped = F.kl_div(q.log(), p, reduction="none").sum(-1)
    assert found == pytest.approx(grouped.tolist(), abs=1e-3)
    assert all(0 <= one <= whole + 1e-3 for one, whole in zip(found, exact.tolist(), strict=True))


def test_same_model_has_not_changed(trained: Path) -> None:
    engine = TorchEngine.open(trained)
    reference = record_reference(engine, 3, None)
    assert reference is not None
    assert len(reference.answers) == 3
    found = measure_forgetting(engine, reference)
    assert found.answers == reference.answers
    assert found.kl == pytest.approx(0, abs=1e-4)
    assert found.top1_agreement == found.same_start == 1


def zero_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.zero_()


def shuffle_embeddings(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    weight.copy_(weight[torch.randperm(len(weight))])


def raise_one_token(model: Any) -> None:
    model.get_output_embeddings().weight[5] *= 40


def damage_weights(model: Any) -> None:
    model.get_output_embeddings().weight[5] = float("nan")


@pytest.mark.parametrize("damage", [zero_a_layer, shuffle_embeddings, raise_one_token, damage_weights])
def test_damage_is_measured_and_warned_of(trained: Path, damage: Any) -> None:
    engine = TorchEngine.open(trained)
    reference = record_reference(engine, 3, None)
    assert reference is not None
    with torch.no_grad():
        damage(engine.model)
    found = measure_forgetting(engine, reference)
    assert not found.kl < 0.5
    assert any("nats per token" in warning for warning in find_warnings(found))


def test_warnings_follow_the_measures() -> None:
    good = Forgetting(["a"] * 8, 0.01, 0.99, 0.75, 0.0, 0.125)
    assert find_warnings(good) == []
    worse = Forgetting(["a"] * 8, 0.01, 0.99, 0.25, 0.25, 0.125)
    assert find_warnings(worse) == [
        "2 of 8 everyday questions get degenerate answers, before training 1",
        "6 of 8 everyday questions are answered with other first words than before training",
    ]
    assert len(find_warnings(Forgetting([], math.nan, 0.0, 0.0, 0.0, 0.0))) == 1


def test_a_resumed_run_keeps_the_initial_model(trained: Path, tmp_path: Path) -> None:
    engine, cache = TorchEngine.open(trained), tmp_path / "general.json"
    first = record_reference(engine, 2, cache)
    with torch.no_grad():
        zero_a_layer(engine.model)
    assert record_reference(engine, 2, cache) == first
    assert record_reference(engine, 2, None) != first


def test_an_untrained_model_forgets_nothing(pico: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache
        assert record_reference(TorchEngine.open(pico), 2, tmp_path / "general.json") is None


def test_questions_are_fixed_and_not_in_the_training_prompts() -> None:
    asked = read_general_questions(40)
    trained_on = (assets.fetch("everyday-prompts") / "prompts.jsonl").read_text("utf-8")
    assert len(set(asked)) == 40
    assert not any(question in trained_on for question in asked)


def _rows(name: str) -> list[dict[str, Any]]:
    turn = {"role": "user", "content": "say a"}
    common = {"group": "", "tools": [], "extra": {}}
    if name == "align.dpo":
        one: dict[str, Any] = {
            "prompt": [turn],
            "chosen": [{"role": "assistant", "content": "b b b b b b"}],
            "rejected": [{"role": "assistant", "content": "a"}],
            "answer": None,
        }
    elif name == "align.grpo":
        one = {"messages": [turn], "answer": {"regex": "b"}}
    else:
        one = {"messages": [turn, {"role": "assistant", "content": "b b b b b b"}], "answer": None}
    return [{"id": f"r{i}", **common, **one} for i in range(16)]


LARGE = {"optimizer": {"learning_rate": 0.5}, "num_train_epochs": 1, "batch_size": 4}
ONE_STEP = {"optimizer": {"learning_rate": 1e-7}, "num_train_epochs": 0.1, "batch_size": 2}


@pytest.mark.parametrize("config", [LARGE, ONE_STEP], ids=["large steps", "one small step"])
@pytest.mark.parametrize("stage", ["train.sft", "align.dpo", "align.grpo", "train.distill", "train.pretrain"])
def test_every_training_tells(trained: Path, tmp_path: Path, stage: str, config: dict[str, Any]) -> None:
    session = Session(tmp_path / "workspace", quiet=True)
    inputs: dict[str, Any] = {
        "student" if stage == "train.distill" else "policy" if "align" in stage else "model": trained
    }
    name = "pairs" if stage == "align.dpo" else "data"
    if stage == "train.pretrain":
        (tmp_path / "text.txt").write_text("b b b b b b b b b b\n\n" * 200)
        text = session.make("data.read", data=tmp_path / "text.txt")
        inputs[name] = session.make("data.pack", model=trained, data=text, config={"max_length": 32})
    else:
        (write_preference if stage == "align.dpo" else write_chat)(tmp_path / "rows", _rows(stage))
        inputs[name] = tmp_path / "rows"
    if stage == "train.distill":
        inputs["teacher"] = make_pico(tmp_path / "teacher", seed=3)
    more = {
        "align.grpo": {"reward_funcs": {"verified": 1.0}, "num_generations": 2},
        "train.pretrain": {"loss_spike_threshold": 0.0},
    }
    fields = {**config, **more.get(stage, {})}
    made = session.make(stage, config=fields, **inputs)
    page = (made.path / "report" / "report.html").read_text("utf-8")
    assert "general_kl" in made.metrics
    if config is LARGE and stage != "align.grpo":  # a group of equal rewards moves nothing
        assert made.metrics["general_kl"] > 0.5
        assert made.metrics["warnings"] >= 1
        assert page.index("Forgetting") < page.index("Everyday questions")
    if config is ONE_STEP:
        assert made.metrics["general_kl"] < 0.01
        assert made.metrics["general_same_start"] == 1
        assert "Everyday questions" in page
