"""Alignments as they are run: what they begin from, what they are held to, what a stopped run goes on as, what they
make, and what is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.align.test_losses import PAIRS, said
from tests.conftest import make_pico

from llmworks.align import cpo, dpo, grpo, kto, online_dpo, orpo, ppo, process, reward, rloo, simpo
from llmworks.align.preference.examples import PromptCompletions, tokenize_pair, tokenize_singles
from llmworks.align.preference.reference import AdapterSnapshot
from llmworks.align.reward_model.calibration import compute_bins, expected_calibration_error, wilson_interval
from llmworks.align.rl.reward_hacking import CLIPPED_RATIO, MEAN_LENGTH, ZERO_STD, find_reward_hacking
from llmworks.align.rl.reward_input import RewardInput
from llmworks.align.rl.reward_model import load_reward_function
from llmworks.align.rl.rewards import RewardFunctions
from llmworks.align.rl.sampling import RolloutSampler, repeated_ngram_share
from llmworks.align.rl.user_reward import UserRewardFunction
from llmworks.core.artifact import Adapter, Artifact, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import ArtifactError, DataError, LlmworksError, ModelError, TrainingError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Engine, Message
from llmworks.data.store.rows import write_chat, write_preference
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model
from llmworks.model.io.reward_head import RewardModel, get_reward_kind
from llmworks.model.lora import lora
from llmworks.runtime.session import load
from llmworks.tokenize.chat.templates import encode
from llmworks.tokenize.load import load_tokenizer
from llmworks.train.finetune.trainable import open_trainable_model
from llmworks.train.sft import SftConfig, sft

STAGES: Mapping[str, tuple[Callable[..., Any], Any]] = {
    "dpo": (dpo.dpo, dpo.DpoConfig),
    "cpo": (cpo.cpo, cpo.CpoConfig),
    "simpo": (simpo.simpo, simpo.SimpoConfig),
    "orpo": (orpo.orpo, orpo.OrpoConfig),
    "kto": (kto.kto, kto.KtoConfig),
    "reward": (reward.reward, reward.RewardConfig),
    "process": (process.process, process.ProcessConfig),
    "grpo": (grpo.grpo, grpo.GrpoConfig),
    "rloo": (rloo.rloo, rloo.RlooConfig),
    "ppo": (ppo.ppo, ppo.PpoConfig),
    "online": (online_dpo.online_dpo, online_dpo.OnlineDpoConfig),
    "sft": (sft, SftConfig),
}
SMALL = {"batch_size": 4, "num_sample_prompts": 1, "lora": {"r": 4, "lora_alpha": 8.0}}
DRAWN = {
    **SMALL,
    "batch_size": 2,
    "num_generations": 3,
    "max_completion_length": 8,
    "max_length": 200,
    "reward_funcs": {"regex": 1.0, "length": -0.1},
    "optimizer": {"learning_rate": 0.01},
}


def whole(row: dict[str, Any]) -> dict[str, Any]:
    return {"group": "", "tools": [], "answer": None, **row}


@pytest.fixture
def pairs(tmp_path: Path) -> Dataset:
    write_preference(tmp_path / "pairs", [whole(row) for row in PAIRS])
    return Dataset(tmp_path / "pairs", name="pairs")


@pytest.fixture
def prompts(tmp_path: Path) -> Dataset:
    """Questions whose answers should have an `o` in them."""
    rows = [
        whole({"id": f"q{i}", "messages": [{"role": "user", "content": said(i, 3)}], "answer": {"regex": "o"}})
        for i in range(6)
    ]
    write_chat(tmp_path / "prompts", rows)
    return Dataset(tmp_path / "prompts", name="prompts")


class Bench:
    """Runs stages on the pico model."""

    def __init__(self, tmp_path: Path, pico: Path) -> None:
        self.tmp_path, self.pico = tmp_path, pico
        self.base = load(str(pico))
        self.said: list[str] = []
        self.report = ReportBuilder()

    def run(
        self,
        stage: str,
        name: str,
        config: Mapping[str, Any],
        *inputs: Any,
        stop: int | None = None,
        seed: int = 0,
        base: Any = None,
        **more: Any,
    ) -> tuple[Any, list[dict[str, Any]]]:
        """(what was made, its steps' metrics)."""
        out, scratch = self.tmp_path / f"{name}-out", self.tmp_path / f"{name}-scratch"
        for place in (out, scratch):
            place.mkdir(exist_ok=True)

        def listener(row: dict[str, Any]) -> None:
            if stop is not None and row.get("step") == stop:
                raise KeyboardInterrupt

        def engine(artifact: Artifact) -> Engine:
            raise LlmworksError("none is needed")

        function, kind = STAGES[stage]
        progress = Progress(scratch / "metrics.jsonl", quiet=True, listener=listener)
        progress.log = self.said.append  # type: ignore[method-assign]
        self.report = ReportBuilder()
        made = function(
            kind.model_validate(config),
            base or self.base,
            *inputs,
            Context(out, scratch, seed, progress, self.report, engine),
            **more,
        )
        return made, [row for row in progress.read_metrics() if "loss" in row]

    def weights(self, name: str) -> bytes:
        return next(iter((self.tmp_path / f"{name}-out").glob("*model.safetensors"))).read_bytes()

    def tuned(self, name: str = "sft") -> Adapter:
        """An adapter that was fine-tuned before."""
        made, _ = self.run(
            "sft", name, {**SMALL, "num_train_epochs": 3, "optimizer": {"learning_rate": 0.02}}, _chats(self.tmp_path)
        )
        assert isinstance(made, Adapter)
        return Adapter(made.path, name=name, manifest=None, about=made.about)


@pytest.fixture
def bench(tmp_path: Path, pico: Path) -> Bench:
    return Bench(tmp_path, pico)

    # given answers


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("dpo", {}),
        ("cpo", {}),
        ("simpo", {}),
        ("orpo", {"orpo_lambda": 1.0}),
        ("kto", {}),
        ("dpo", {"method": "full", "lora": {}, "optimizer": {"learning_rate": 0.003}}),
    ],
)
def test_pairs_are_learned(stage: str, config: dict[str, Any], bench: Bench, pairs: Dataset) -> None:
    made, steps = bench.run(
        stage,
        "a",
        {**SMALL, "num_train_epochs": 12, "optimizer": {"learning_rate": 0.02}, **config},
        pairs,
        eval_data=pairs,
    )
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert made.metrics["accuracy"] > 0.9  # of what it was trained on
    assert isinstance(made, Model if config.get("method") == "full" else Adapter)
    assert bench.report.data["evaluations"][-1]["eval_margin"] > 0
    assert "Reward accuracy on" in bench.report.subtitle
    headings = [block.heading for block in bench.report.blocks]
    assert {"Loss", "Rewards", "Reward accuracy", "Held-out prompts: completions before and after training"} <= set(
        headings
    )


@pytest.mark.parametrize(
    ("stage", "config"), [("dpo", {}), ("dpo", {"precompute_ref_log_probs": False}), ("kto", {}), ("reward", {})]
)
def test_a_stopped_run_goes_on_bit_for_bit(stage: str, config: dict[str, Any], bench: Bench, pairs: Dataset) -> None:
    config = {**SMALL, "num_train_epochs": 2, "save_steps": 1, **config}
    if stage == "reward":
        del config["num_sample_prompts"]
    bench.run(stage, "whole", config, pairs, eval_data=pairs)
    with pytest.raises(KeyboardInterrupt):
        bench.run(stage, "stopped", config, pairs, eval_data=pairs, stop=2)
    bench.run(stage, "stopped", config, pairs, eval_data=pairs)
    assert bench.weights("whole") == bench.weights("stopped")
    bench.run(stage, "other", config, pairs, seed=1)
    assert bench.weights("whole") != bench.weights("other")


def test_the_reference_of_a_tuned_policy_is_the_tuned_policy(bench: Bench, pairs: Dataset) -> None:
    """At the first step the policy is its reference: no margin, and a loss of log 2; with the adapter switched off it
    would not be.

    Cached or live, the steps are the same.
    """
    adapter = bench.tuned()
    found = {}
    for way in (True, False):
        made, found[way] = bench.run(
            "dpo",
            f"cached-{way}",
            {
                **{k: v for k, v in SMALL.items() if k != "lora"},
                "num_train_epochs": 2,
                "precompute_ref_log_probs": way,
                "optimizer": {"learning_rate": 0.01},
            },
            pairs,
            adapter=adapter,
        )
        assert found[way][0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert abs(found[way][0]["rewards/margins"]) < 1e-4
        assert made.about["rank"] == 4  # the shape that it had
    for one, other in zip(found[True], found[False], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert found[False][-1]["loss"] < 0.69
    network = open_trainable_model(bench.pico)
    network.load_adapter(adapter.path)
    start = AdapterSnapshot(network.network)
    assert not start.is_zero
    ids = torch.tensor([[3, 7, 11, 90]])
    began, plain = network.network(input_ids=ids).logits, load_model(bench.pico)(input_ids=ids).logits
    assert float((began - plain).detach().abs().max()) > 0.1
    with torch.no_grad():
        for _, layer in lora.iter_lora_layers(network.network):
            layer.b.mul_(3.0)
    moved = network.network(input_ids=ids).logits
    with start.restore():
        assert torch.equal(network.network(input_ids=ids).logits, began)
    assert torch.equal(network.network(input_ids=ids).logits, moved)


def test_a_separate_reference_that_is_the_same_model_changes_nothing(bench: Bench, pairs: Dataset) -> None:
    """The adapter switched off, chances that were kept, and the model itself as another: the same steps."""
    found = [
        bench.run("dpo", name, {**SMALL, "num_train_epochs": 2, **config}, pairs, **more)[1]
        for name, config, more in (
            ("a", {}, {}),
            ("b", {"precompute_ref_log_probs": False}, {}),
            ("c", {}, {"ref_model": bench.base}),
        )
    ]
    for rows in zip(*found, strict=True):
        assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) for row in rows)
        assert all(row["rewards/margins"] == pytest.approx(rows[0]["rewards/margins"], abs=1e-5) for row in rows)


def test_held_out_rows_with_the_ids_of_others_are_apart(bench: Bench, tmp_path: Path) -> None:
    """What the reference thinks of answers is kept by their ids, and is each one's own. Live, nothing is kept."""
    rows = [{**whole(row), "id": str(number % 4)} for number, row in enumerate(PAIRS)]
    write_preference(tmp_path / "some", rows[:4])
    write_preference(tmp_path / "others", rows[4:])
    data, held = (Dataset(tmp_path / name, name=name) for name in ("some", "others"))
    looks = []
    for stage, way in (("dpo", True), ("dpo", False), ("kto", True), ("kto", False)):
        made, steps = bench.run(
            stage,
            f"{stage}-{way}",
            {**SMALL, "num_train_epochs": 3, "precompute_ref_log_probs": way, "optimizer": {"learning_rate": 0.01}},
            data,
            eval_data=held,
        )
        looks.append([*(row["loss"] for row in steps), made.metrics["eval_loss"]])
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)
    assert looks[2] == pytest.approx(looks[3], rel=1e-4)


def test_dropout_is_off_in_both(bench: Bench, pairs: Dataset) -> None:
    """An adapter that was tuned with dropout goes on without: the policy at its first step is its reference."""
    made, _ = bench.run(
        "sft",
        "sft",
        {
            **SMALL,
            "num_sample_prompts": 0,
            "num_train_epochs": 3,
            "lora": {"r": 4, "lora_dropout": 0.5},
            "optimizer": {"learning_rate": 0.02},
        },
        _chats(bench.tmp_path),
    )
    adapter = Adapter(made.path, name="sft", about=made.about)
    assert json.loads((made.path / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    _, steps = bench.run("dpo", "a", {"batch_size": 4, "num_sample_prompts": 0}, pairs, adapter=adapter)
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_the_adapter_that_goes_on_is_of_the_model_and_keeps_its_shape(bench: Bench, pairs: Dataset) -> None:
    adapter = bench.tuned()
    with pytest.raises(UserError, match="whose shape is fixed"):
        bench.run("dpo", "a", {**SMALL, "num_sample_prompts": 0}, pairs, adapter=adapter)
    with pytest.raises(UserError, match="method full cannot continue an adapter"):
        bench.run("dpo", "b", {"method": "full"}, pairs, adapter=adapter)
    other = load(str(make_pico(bench.tmp_path / "other", seed=5)))
    with pytest.raises(ArtifactError, match="was trained on the model"):
        bench.run("dpo", "c", {}, pairs, adapter=adapter, base=other)


def test_a_reference_with_another_vocabulary_is_refused(bench: Bench, pairs: Dataset, tmp_path: Path) -> None:
    other = load(str(make_pico(tmp_path / "other", seed=3)))
    _, steps = bench.run(
        "dpo", "a", {**SMALL}, pairs, ref_model=other
    )  # of the same vocabulary: another model's chances
    assert abs(steps[0]["rewards/margins"]) > 1e-3
    tokenizer = load_tokenizer(other.path)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other.path)
    with pytest.raises(UserError, match="another vocabulary"):
        bench.run("dpo", "b", {**SMALL}, pairs, ref_model=other)
    with pytest.raises(UserError, match="cached"):
        bench.run("dpo", "c", {**SMALL, "precompute_ref_log_probs": False}, pairs, ref_model=other)


def test_pairs_that_cannot_be_used_are_set_aside(bench: Bench, tmp_path: Path) -> None:
    rows = [whole(row) for row in PAIRS[:4]]
    rows[1] = {**rows[1], "rejected": [{"role": "assistant", "content": "  "}]}
    rows[2] = {**rows[2], "rejected": rows[2]["chosen"]}
    rows[3] = {**rows[3], "chosen": [{"role": "assistant", "content": "fox " * 300}]}
    write_preference(tmp_path / "some", rows)
    made, _ = bench.run("dpo", "a", {**SMALL, "max_length": 100}, Dataset(tmp_path / "some", name="some"))
    reasons = [json.loads(line)["reason"] for line in (made.path / "set_aside.jsonl").read_text().splitlines()]
    assert reasons == ["the rejected side is empty", "both sides are equal", reasons[2]]
    assert "longer than max_length 100" in reasons[2]
    assert made.metrics["rows"] == 1
    with pytest.raises(DataError, match="overlong to drop or truncate"):
        bench.run(
            "dpo", "b", {**SMALL, "max_length": 100, "overlong": "error"}, Dataset(tmp_path / "some", name="some")
        )
    write_preference(tmp_path / "none", rows[1:2])
    with pytest.raises(DataError, match="none of 1 rows can be used; the first: the rejected side is empty"):
        bench.run("dpo", "c", {**SMALL}, Dataset(tmp_path / "none", name="none"))
    write_chat(tmp_path / "chats", [whole({"id": "x", "messages": PAIRS[0]["prompt"] + PAIRS[0]["chosen"]})])
    with pytest.raises(DataError, match="has no preference pairs"):
        bench.run("dpo", "d", {**SMALL}, Dataset(tmp_path / "chats", name="chats"))


def test_what_a_configuration_refuses() -> None:
    for kind, fields, told in (
        (dpo.DpoConfig, {"lora": {"lora_dropout": 0.1}}, "dropout"),
        (dpo.DpoConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is for loss_type"),
        (dpo.DpoConfig, {"loss_type": "exo_pair"}, "needs label_smoothing"),
        (dpo.DpoConfig, {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "log-ratios unchanged"),
        (dpo.DpoConfig, {"loss_type": "aot", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps to 1"),
        (dpo.DpoConfig, {"method": "full", "precompute_ref_log_probs": False}, "cached"),
        (grpo.GrpoConfig, {"reward_funcs": {"nosuch": 1}}, "is unknown; use one of"),
        (grpo.GrpoConfig, {"reward_funcs": {}}, "is empty"),
        (grpo.GrpoConfig, {"reward_funcs": {"overlong": 1}}, "need each other"),
        (grpo.GrpoConfig, {"num_generations": 1}, "greater than or equal to 2"),
        (grpo.GrpoConfig, {"use_bias_correction_kl": True}, "set beta above 0"),
        (grpo.GrpoConfig, {"max_completion_length": 4000}, "leaves no token"),
        (reward.RewardConfig, {"num_sample_prompts": 2}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=told):
            kind.model_validate(fields)
    assert dpo.DpoConfig().optimizer.learning_rate == 1e-4
    assert dpo.DpoConfig.model_validate({"method": "full"}).optimizer.learning_rate == 5e-6


def test_single_answers_by_their_label(pico: Path, bench: Bench, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico)
    row = whole({"id": "a", "messages": PAIRS[0]["prompt"] + PAIRS[0]["chosen"], "extra": {"label": False}})
    (made,) = tokenize_singles(tokenizer, row, 200)
    assert isinstance(made, PromptCompletions)
    assert not made.desirable
    assert "label" in str(tokenize_singles(tokenizer, {**row, "extra": {}}, 200)[0])
    both = tokenize_singles(tokenizer, whole(PAIRS[0]), 200)
    assert [one.desirable for one in both if isinstance(one, PromptCompletions)] == [True, False]
    write_chat(tmp_path / "labelled", [{**row, "id": str(i)} for i in range(3)])
    with pytest.raises(DataError, match="all 3 completions are undesirable"):
        bench.run("kto", "a", SMALL, Dataset(tmp_path / "labelled", name="labelled"))


def test_answers_of_several_turns_and_calls_are_weighed_where_the_assistant_speaks(pico: Path) -> None:
    tokenizer = load_tokenizer(pico)
    prompt = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "what"},
        {"role": "user", "content": "is"},
    ]
    sides = {
        "chosen": [
            {"role": "assistant", "content": "quick"},
            {"role": "user", "content": "name"},
            {"role": "assistant", "content": "brown"},
        ],
        "rejected": [{"role": "assistant", "content": "city"}],
    }
    made = tokenize_pair(tokenizer, {"id": "a", "prompt": prompt, **sides, "tools": []}, 200)
    assert isinstance(made, PromptCompletions)
    text = [tokenizer.decode([i for i, m in zip(a.ids, a.mask, strict=True) if m]) for a in made.completions]
    assert text == ["quick<|im_end|>brown<|im_end|>", "city<|im_end|>"]
    assert tokenizer.decode(made.prompt).endswith("is<|im_end|>\n<|im_start|>assistant\n")

    # models that score


def test_a_reward_model_ranks_scores_as_transformers_does_and_writes_nothing(bench: Bench, pairs: Dataset) -> None:
    made, _ = bench.run(
        "reward",
        "a",
        {
            **{k: v for k, v in SMALL.items() if k != "num_sample_prompts"},
            "num_train_epochs": 30,
            "optimizer": {"learning_rate": 0.02},
        },
        pairs,
        eval_data=pairs,
    )
    assert isinstance(made, Model)
    assert made.metrics["accuracy"] == 1.0
    assert made.metrics["expected_calibration_error"] < 0.5
    assert get_reward_kind(made.path) == "whole"
    assert {"Calibration", "Calibration table"} <= {block.heading for block in bench.report.blocks}
    tokenizer = load_tokenizer(made.path)
    values = load_reward_function(made)
    cases = [
        RewardInput({"id": "x"}, (Message("user", row["prompt"][0]["content"]),), row[side][0]["content"], 0, False)
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    ours = values(cases)
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    for row, (chosen, rejected) in zip(PAIRS, zip(ours[::2], ours[1::2], strict=True), strict=True):
        assert isinstance(chosen, float)
        assert isinstance(rejected, float)
        assert chosen > rejected
        example = tokenize_pair(tokenizer, row, 200)
        assert isinstance(example, PromptCompletions)
        with torch.no_grad():
            there = theirs(input_ids=torch.tensor([[*example.prompt, *example.completions[0].ids]])).logits
        assert float(there) == pytest.approx(chosen, abs=1e-4)
    with pytest.raises(ModelError, match="is a classifier or reward model"):
        TorchEngine.open(made.path)
    with pytest.raises(ModelError, match="is a classifier or reward model"):
        open_trainable_model(made.path)
    with pytest.raises(ModelError, match="is not a reward model"):
        RewardModel(bench.pico)


def test_steps_are_told_right_from_wrong(bench: Bench, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": said(i, 3),
            "steps": ["quick fox", "Oslo is" if i % 2 else "user name", "brown"],
            "labels": [True, bool(i % 2), bool(i % 2)],
        }
        for i in range(8)
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x", "steps": ["a"], "labels": []}]))
    made, _ = bench.run(
        "process",
        "a",
        {
            **{k: v for k, v in SMALL.items() if k != "num_sample_prompts"},
            "num_train_epochs": 30,
            "optimizer": {"learning_rate": 0.02},
        },
        Dataset(file, name="steps"),
        eval_data=Dataset(file, name="steps"),
    )
    assert made.metrics["accuracy"] > 0.95
    assert made.metrics["dropped"] == 1
    values = load_reward_function(made)
    good, bad = (
        values([RewardInput({}, (Message("user", said(i, 3)),), text, 0, False)])[0]
        for i, text in ((1, "quick fox\nOslo is\nbrown"), (2, "quick fox\nuser name\nbrown"))
    )
    assert isinstance(good, float)
    assert isinstance(bad, float)
    assert good > 0.5 > bad
    from transformers import AutoModelForTokenClassification

    theirs = AutoModelForTokenClassification.from_pretrained(made.path).eval()
    tokenizer = load_tokenizer(made.path)
    text = f"<|im_start|>user\n{said(2, 3)}<|im_end|>\n<|im_start|>assistant\n"
    ids = [
        *encode(tokenizer, text),
        *(i for step in ("quick fox", "user name", "brown") for i in encode(tokenizer, step + "\n")),
    ]
    with torch.no_grad():
        there = theirs(input_ids=torch.tensor([ids])).logits[0, :, 0].sigmoid()
    ends = [i for i, token in enumerate(ids) if tokenizer.decode([token]) == "\n"][-3:]
    assert float(there[ends].min()) == pytest.approx(bad, abs=1e-4)
    file.write_text(json.dumps({"prompt": "x", "steps": ["a"], "labels": [True]}) + "\n")
    with pytest.raises(DataError, match="all 1 steps are labeled right"):
        bench.run("process", "b", {}, Dataset(file, name="steps"))


def test_calibration_is_that_of_its_definition() -> None:
    found = compute_bins([0.05, 0.95, 0.95, 0.95, 1.0], [False, True, True, False, True])
    assert [(b.size, b.predicted, b.observed) for b in found] == [(1, 0.05, 0.0), (4, pytest.approx(0.9625), 0.75)]
    assert expected_calibration_error(found) == pytest.approx((0.05 + 4 * 0.2125) / 5)
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)  # the paper's own example has these

    # the policy's own answers


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("grpo", {"beta": 0.01, "num_train_epochs": 30}),
        ("grpo", {"num_minibatches": 3, "num_iterations": 2, "batch_size": 2, "dynamic_sampling_rounds": 1}),
        ("rloo", {}),
        ("ppo", {"num_iterations": 2, "batch_size": 6, "num_train_epochs": 40}),
        ("online", {"num_generations": 4, "num_train_epochs": 24}),
    ],
)
def test_a_policy_learns_what_is_rewarded(stage: str, config: dict[str, Any], bench: Bench, prompts: Dataset) -> None:
    """More of its answers have an `o` in the end than at first, drawn ones and greedy ones."""
    made, steps = bench.run(stage, "a", {**DRAWN, "num_train_epochs": 16, **config}, prompts, eval_data=prompts)
    third = len(steps) // 3
    assert sum(row["rewards/regex/mean"] for row in steps[-third:]) > sum(
        row["rewards/regex/mean"] for row in steps[:third]
    )
    assert made.metrics["reward"] > made.metrics["initial_reward"]
    assert made.metrics["win_rate"] >= 0.5
    assert any(row["frac_reward_zero_std"] < 1 for row in steps)
    if stage != "online":
        assert 0 < steps[0]["engine_gap"] < 1e-4
    assert {"Reward", "Entropy", "Completion length", "Sample completions during training"} <= {
        block.heading for block in bench.report.blocks
    }
    TorchEngine.open(bench.pico, adapter=made.path)


@pytest.mark.parametrize(
    ("stage", "config", "stop"),
    [
        ("grpo", {"num_minibatches": 3, "beta": 0.1, "num_iterations": 2}, 3),
        ("ppo", {"num_iterations": 2, "batch_size": 3}, 2),
        ("grpo", {}, 1),
    ],
)
def test_a_run_that_is_killed_in_a_rollout_goes_on_bit_for_bit(
    stage: str, config: dict[str, Any], stop: int, bench: Bench, prompts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**DRAWN, "num_train_epochs": 2, "save_steps": 1, **config}
    bench.run(stage, "whole", config, prompts)
    with pytest.raises(KeyboardInterrupt):
        bench.run(stage, "stopped", config, prompts, stop=stop)
    values, count = RolloutSampler.score_completions, 0

    def killed(self: RolloutSampler, groups: Any) -> Any:
        nonlocal count
        count += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(
        RolloutSampler, "score_completions", killed
    )  # answers are drawn, and the run ends before they are worth anything
    with pytest.raises(KeyboardInterrupt):
        bench.run(stage, "stopped", config, prompts)
    assert count == 1
    monkeypatch.setattr(RolloutSampler, "score_completions", values)
    bench.run(stage, "stopped", config, prompts)
    assert bench.weights("whole") == bench.weights("stopped")


def test_tokens_are_learned_as_they_were_drawn(bench: Bench, prompts: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that no tokenizer would give for their text stay what they are; the end is learned where there was one, and
    not where the answer was cut off.
    """
    tokenizer = load_tokenizer(bench.pico)
    strange = tuple(
        encode(tokenizer, letter)[0] for letter in "the fox"
    )  # letter by letter: its text is encoded otherwise
    assert encode(tokenizer, tokenizer.decode(strange)) != strange
    stop = tokenizer.eos_token_id

    def generate(self: TorchEngine, requests: Any) -> list[Completion]:
        return [
            Completion(
                "the fox",
                "stop" if i % 2 else "length",
                strange,
                (-1.0,) * len(strange),
                4,
                len(strange),
                stop if i % 2 else None,
            )
            for i, _ in enumerate(requests)
        ]

    seen = []
    examples = RolloutSampler.to_examples

    def noted(self: RolloutSampler, made: Any) -> Any:
        found = examples(self, made)
        seen.extend(found)
        return found

    monkeypatch.setattr(TorchEngine, "generate", generate)
    monkeypatch.setattr(RolloutSampler, "to_examples", noted)
    bench.run("grpo", "a", {**DRAWN, "reward_funcs": {"length": 1.0}}, prompts)
    answers = [answer.ids for example in seen for answer in example.completions]
    assert set(answers) == {strange, (*strange, stop)}


def test_old_chances_are_at_the_temperature_of_the_draws(bench: Bench, prompts: Dataset) -> None:
    """The first ratio of every draw is 1, at whatever temperature; and at 1 the engine and the trainer say the same."""
    for temperature in (0.7, 1.0):
        _, steps = bench.run(
            "grpo",
            f"t{temperature}",
            {**DRAWN, "temperature": temperature, "num_minibatches": 3, "optimizer": {"learning_rate": 1e-8}},
            prompts,
        )
        assert all(row["ratio"] == pytest.approx(1.0, abs=1e-4) for row in steps)
        assert ("engine_gap" in steps[0]) is (temperature == 1.0)


def test_answers_that_are_all_worth_the_same_are_told(bench: Bench, prompts: Dataset) -> None:
    _, steps = bench.run("grpo", "a", {**DRAWN, "num_train_epochs": 2, "reward_funcs": {"regex": 1e-12}}, prompts)
    assert steps[-1]["frac_reward_zero_std"] == 1.0
    assert any("there is no learning signal" in line for line in bench.said)
    assert any("little learning signal" in alarm for alarm in bench.report.data["alarms"])


def test_alarms() -> None:
    quiet = {"reward": 0.5, MEAN_LENGTH: 20.0, "repeated": 0.05, CLIPPED_RATIO: 0.0, ZERO_STD: 0.1}
    assert find_reward_hacking([quiet] * 20) == []
    found = find_reward_hacking([quiet] * 10 + [{**quiet, MEAN_LENGTH: 60.0, "repeated": 0.6, CLIPPED_RATIO: 0.9}] * 10)
    assert [
        bool(word in line)
        for word, line in zip(("times longer", "repeat themselves", "are truncated"), found, strict=True)
    ] == [True] * 3
    assert repeated_ngram_share([1, 2, 3, 4] * 5) > 0.7
    assert repeated_ngram_share([1, 2, 3, 4, 5, 6]) == 0.0


def test_mistakes_of_online_runs(bench: Bench, prompts: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model needs the input `reward_model`"):
        bench.run("grpo", "a", {**DRAWN, "reward_funcs": {"model": 1.0}}, prompts)
    with pytest.raises(UserError, match="the input `reward_model` is for the reward function `model`"):
        bench.run("grpo", "b", DRAWN, prompts, reward_model=bench.base)
    with pytest.raises(DataError, match="answer"):
        bench.run("grpo", "c", {**DRAWN, "reward_funcs": {"code": 1.0}}, prompts)
    with pytest.raises(DataError, match="6 prompts, a rollout needs 16"):
        bench.run("grpo", "d", {**DRAWN, "batch_size": 16}, prompts)
    with pytest.raises(DataError, match="leaves no room"):
        bench.run("grpo", "e", {**DRAWN, "max_completion_length": 190}, prompts)
    with pytest.raises(UserError, match="cannot be read"):
        bench.run("grpo", "f", {**DRAWN, "reward_funcs": {f"{tmp_path}/no.py:f": 1.0}}, prompts)
    assert not list((tmp_path / "f-out").iterdir())

    # rewards of the user's own


CODE = """
import os, time
def fine(prompt, completion, row):
    print("noise")
    return len(completion) + len(prompt) * 100
def bad(prompt, completion, row):
    if "raise" in completion: raise ValueError("no")
    if "hang" in completion:
        while True: pass
    if "deaf" in completion:
        import signal
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(100)
    if "nan" in completion: return float("nan")
    if "exit" in completion: os._exit(3)
    if "text" in completion: return "much"
    return 1
def spy(prompt, completion, row):
    import socket
    found = int(os.path.exists(row["secret"]) or os.path.exists("/etc/passwd"))
    try: socket.create_connection(("127.0.0.1", 22), 1); found += 10
    except OSError: pass
    return found
"""


def case(text: str) -> RewardInput:
    return RewardInput({"id": text}, (Message("user", "q"),), text, 3, False)


def test_a_function_of_the_user_runs_in_the_sandbox(tmp_path: Path) -> None:
    """What raises, hangs, ends the program, says NaN or a word is told of its answer; the others have their value;
    nothing of the host is seen.
    """
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    cases = [
        {"prompt": [{"role": "user", "content": "q"}], "completion": text, "row": {}}
        for text in ("ok", "raise", "hang", "text", "ok", "exit", "ok")
    ]
    assert UserRewardFunction(f"{file}:fine", 2.0).compute_rewards(cases[:1]) == [102.0]
    found = UserRewardFunction(f"{file}:bad", 1.0).compute_rewards(cases)
    assert found[0] == found[4] == found[6] == 1.0
    assert "ValueError: no" in str(found[1])
    assert "took longer than 1 s" in str(found[2])
    assert "ValueError" in str(found[3])
    assert "ended the program (exit code 3)" in str(found[5])
    assert UserRewardFunction(f"{file}:spy", 2.0).compute_rewards([{**cases[0], "row": {"secret": str(file)}}]) == [0.0]
    for name, told in (
        (f"{file}:none", "has no function 'none'; it has fine, bad, spy"),
        (f"{tmp_path}/no.py:f", "cannot be read"),
    ):
        with pytest.raises(UserError, match=told.replace("(", r"\(")):
            UserRewardFunction(name, 1.0)
    file.write_text("import nosuch\ndef f(p, c, r): return 1\n")
    with pytest.raises(UserError, match="nosuch"):
        UserRewardFunction(f"{file}:f", 1.0).compute_rewards(cases[:1])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        UserRewardFunction(f"{file}:f", 1.0)


def test_what_does_not_hear_the_alarm_is_ended_from_outside(tmp_path: Path) -> None:
    """Each at its own limit: the others do not wait for it."""
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    cases = [{"prompt": [], "completion": text, "row": {}} for text in ("ok", "deaf", "ok", "deaf")]
    began = time.monotonic()
    assert UserRewardFunction(f"{file}:bad", 0.5).compute_rewards(cases) == [
        1.0,
        "took longer than 0.5 s",
        1.0,
        "took longer than 0.5 s",
    ]
    assert time.monotonic() - began < 10  # not ten seconds and half a second for each that is left, twice


def test_what_a_function_writes_harms_nobody(tmp_path: Path) -> None:
    """Letters that are none, much on stderr, lines on the channels of the program that calls it, more failures than it
    may print.
    """
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, sys\ndef f(prompt, completion, row):\n    for fd in range(3, 9):\n        try: os.write(fd,"
        " b'{broken\\n{\"number\": 7777, \"value\": 9}\\n')\n        except OSError: pass\n    sys.stderr.write('e' *"
        " 300)\n    if completion == 'bad': raise ValueError(chr(0xd800) + 'x' * 500)\n    return 1\n"
    )
    cases = [{"prompt": [], "completion": "bad" if i % 2 else "ok", "row": {}} for i in range(2400)]
    found = UserRewardFunction(f"{file}:f", 2.0).compute_rewards(cases)
    assert all(value == 1.0 for value in found[::2])
    assert all(isinstance(value, str) and value.startswith("ValueError: ?xxx") for value in found[1::2])


def test_an_answer_without_a_reward_is_kept_aside_or_stops_the_run(tmp_path: Path) -> None:
    file, aside = tmp_path / "mine.py", tmp_path / "aside.jsonl"
    file.write_text(CODE)
    made = RewardFunctions(
        {f"{file}:bad": 2.0, "length": 0.5}, max_completion_length=6, overlong_buffer=0, timeout=1.0, failed_file=aside
    )
    good, bad = made.compute_rewards([case("ok"), case("nan")])
    assert good.total == 2.25
    assert good.by_function == {f"{file}:bad": 1.0, "length": 0.5}
    assert bad.total != bad.total
    assert json.loads(aside.read_text())["reason"] == f"{file}:bad: gave nan"
    with pytest.raises(TrainingError, match=r"row 'raise': .*ValueError: no; on_reward_error is stop"):
        RewardFunctions(
            {f"{file}:bad": 1.0}, max_completion_length=6, overlong_buffer=0, timeout=1.0, stop_on_error=True
        ).compute_rewards([case("raise")])


def test_an_answer_without_a_reward_is_not_learned(bench: Bench, prompts: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def f(prompt, completion, row):\n    if 'e' in completion: raise ValueError('e')\n    return len(completion)\n"
    )
    made, steps = bench.run("grpo", "a", {**DRAWN, "num_train_epochs": 1, "reward_funcs": {f"{file}:f": 1.0}}, prompts)
    assert 0 < sum(row["failed"] for row in steps) < len(steps)
    assert all(row["loss"] == row["loss"] for row in steps)
    kept = [json.loads(line) for line in (made.path / "failed_rewards.jsonl").read_text().splitlines()]
    assert any("have no reward because a reward function failed" in alarm for alarm in bench.report.data["alarms"])
    assert not any(row["evaluation"] for row in kept)
    assert made.metrics["steps"] == 3


def test_a_judge_and_a_model_are_rewards(bench: Bench, pairs: Dataset, tmp_path: Path) -> None:
    scorer, _ = bench.run("reward", "r", {**{k: v for k, v in SMALL.items() if k != "num_sample_prompts"}}, pairs)

    class Judge:
        def each(self, requests: Any) -> Any:
            yield from (
                (at, Completion("fine [[7]]" if "wonderful" in request.messages[0].content else "hm", "stop"))
                for at, request in enumerate(requests)
            )

        def close(self) -> None:
            pass

    made = RewardFunctions(
        {"judge": 1.0, "model": 1e-9},
        max_completion_length=8,
        overlong_buffer=0,
        timeout=1.0,
        reward_model=scorer,
        judge=Judge,
    )  # type: ignore[arg-type]
    good, bad = made.compute_rewards([case("wonderful"), case("x")])
    assert good.by_function["judge"] == pytest.approx(6 / 9)
    assert "model" in good.by_function
    assert "gave no grade" in bad.error


def _chats(folder: Path) -> Dataset:
    write_chat(
        folder / "chats", [whole({"id": row["id"], "messages": [*row["prompt"], *row["rejected"]]}) for row in PAIRS]
    )
    return Dataset(folder / "chats", name="chats")
