"""Where alignments went wrong once: number formats, answers without a reward, weights that are not the last, pairs that
say strange things.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.align.test_align import DRAWN, SMALL, Bench, bench, pairs, prompts, whole  # noqa: F401 (fixtures)
from tests.align.test_losses import said

from llmworks.align.grpo import GrpoConfig
from llmworks.align.losses.dpo import discopop, f_divergence_scores
from llmworks.align.losses.orpo import log_odds
from llmworks.align.ppo import PpoConfig
from llmworks.align.preference.examples import CompletionTokens, PromptCompletions, tokenize_pair
from llmworks.align.preference.objective import mismatch_completions
from llmworks.align.reward_model.calibration import wilson_interval
from llmworks.align.rl.objective import PolicyLossOptions
from llmworks.align.rl.ppo_objective import PpoObjective
from llmworks.align.rl.rewards import RewardFunctions
from llmworks.align.rl.rollout import Rollout, SampledCompletion
from llmworks.align.rl.sampling import RolloutSampler
from llmworks.core.artifact import Dataset
from llmworks.core.errors import TrainingError
from llmworks.core.progress import Progress
from llmworks.data.store.rows import write_chat
from llmworks.runtime.execute import compute_step_key
from llmworks.runtime.resolve import resolve_stage
from llmworks.tokenize.load import load_tokenizer

SLOWLY = {"optimizer": {"learning_rate": 1e-8}}


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("dpo", {}),
        ("dpo", {"method": "full", "lora": {}}),
        ("kto", {}),
        ("grpo", {"beta": 0.1, "num_minibatches": 2}),
        ("ppo", {"num_iterations": 2, "batch_size": 3}),
    ],
)
def test_in_half_formats_the_policy_begins_as_its_reference(
    stage: str, config: dict[str, Any], bench: Bench, pairs: Dataset, prompts: Dataset
) -> None:
    online = stage in ("grpo", "ppo")
    _, steps = bench.run(
        stage,
        "a",
        {**(DRAWN if online else SMALL), "num_train_epochs": 1, "precision": "bf16", **config, **SLOWLY},
        prompts if online else pairs,
    )
    if online:
        assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-3)
        assert steps[-1]["ratio"] == pytest.approx(1.0, abs=1e-3)
    else:
        assert steps[0]["loss"] == pytest.approx(math.log(2) if stage == "dpo" else 0.5, abs=1e-3)


def test_what_is_in_a_reward_file_decides_what_is_made(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    stage, keys = resolve_stage("align.grpo"), []
    for text in ("def f(p, c, r): return 1\n", "def f(p, c, r): return 2\n", "def f(p, c, r): return 1\n"):
        file.write_text(text)
        keys.append(compute_step_key(stage, GrpoConfig(reward_funcs={f"{file}:f": 1.0}), {}, 0))
    assert keys[0] == keys[2] != keys[1]


def drawn(reward: float, *, cut: bool = False) -> SampledCompletion:
    return SampledCompletion([3, 4], "a", cut, reward, {}, [], old=[-1.0, -1.0], values=[0.5, 0.25])


@pytest.mark.parametrize("cut", [False, True])
def test_ppo_does_not_reckon_with_answers_that_count_for_nothing(
    cut: bool, bench: Bench, prompts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advantages of the others are what they are without them."""
    actors: list[PpoObjective] = []
    monkeypatch.setattr(PpoObjective, "record_rollout", lambda self, number, made: actors.append(self))
    with pytest.raises(Exception):  # noqa: B017 (the run has no figures then)
        bench.run("ppo", "a", {**DRAWN, "num_train_epochs": 1, "mask_truncated_completions": True}, prompts)
    actor = actors[0]
    assert actor.loss_options == PolicyLossOptions(aggregation=actor.loss_options.aggregation, train_on_truncated=False)
    without = Rollout([0], [[drawn(10.0), drawn(11.0)]], {})
    beside = Rollout(
        [0, 1], [[drawn(10.0), drawn(11.0)], [drawn(5.0 if cut else math.nan, cut=cut), drawn(math.nan)]], {}
    )
    for made in (without, beside):
        actor.process_rollout(0, made)
    assert [one.advantages for one in beside.completions[0]] == [
        pytest.approx(one.advantages) for one in without.completions[0]
    ]
    assert all(not any(one.advantages) for one in beside.completions[1])
    assert beside.metrics["explained_variance"] == pytest.approx(without.metrics["explained_variance"])


def test_figures_are_those_of_the_weights_that_are_saved(
    bench: Bench, prompts: Dataset, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best look is not the last; what is said of the result is said of the best."""
    config = {
        **DRAWN,
        "num_train_epochs": 4,
        "eval_steps": 1,
        "metric_for_best_model": "accuracy",
        "optimizer": {"learning_rate": 0.05},
    }
    made, _ = bench.run("grpo", "a", config, prompts, eval_data=prompts)
    looks = [
        row
        for row in Progress(bench.tmp_path / "a-scratch" / "metrics.jsonl", quiet=True).read_metrics()
        if "eval_loss" in row
    ]
    best = max(row["accuracy"] for row in looks)
    assert made.metrics["eval_reward"] == pytest.approx(best, abs=1e-4)
    assert f"{best:.3f} after" in bench.report.subtitle
    made, _ = bench.run(
        "reward",
        "r",
        {
            **{k: v for k, v in SMALL.items() if k != "num_sample_prompts"},
            "num_train_epochs": 10,
            "eval_steps": 1,
            "metric_for_best_model": "eval_loss",
            "optimizer": {"learning_rate": 0.05},
        },
        pairs,
        eval_data=pairs,
    )
    looks = [
        row
        for row in Progress(bench.tmp_path / "r-scratch" / "metrics.jsonl", quiet=True).read_metrics()
        if "eval_loss" in row
    ]
    least = min(looks, key=lambda row: row["eval_loss"])
    assert made.metrics["best_step"] == least["step"] + 1
    assert made.metrics["accuracy"] == pytest.approx(least["accuracy"], abs=1e-4)


def test_single_answers_raise_no_alarm(bench: Bench, prompts: Dataset) -> None:
    _, steps = bench.run(
        "ppo",
        "a",
        {
            **DRAWN,
            "num_generations": 1,
            "batch_size": 6,
            "num_train_epochs": 6,
            "reward_funcs": {"length": 1.0, "regex": 1.0},
        },
        prompts,
    )
    assert any(row["frac_reward_zero_std"] == 0.0 for row in steps if row["reward_std"] > 0)
    assert all(row["frac_reward_zero_std"] == 0.0 for row in steps if row["reward_std"] > 1e-6)
    with pytest.raises(ValidationError, match="it needs num_generations of at least 2"):
        PpoConfig(dynamic_sampling_rounds=1, num_generations=1)


def test_answers_that_are_cut_off_are_in_no_pair(
    bench: Bench, prompts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = RolloutSampler.sample_completions

    def cut(self: RolloutSampler, *given: Any) -> Any:
        return [
            [(completion, replace(case, truncated=True)) for completion, case in group]
            for group in answers(self, *given)
        ]

    monkeypatch.setattr(RolloutSampler, "sample_completions", cut)
    for way in (True, False):
        _, steps = bench.run(
            "online",
            f"masked-{way}",
            {
                **DRAWN,
                "num_train_epochs": 2,
                "mask_truncated_completions": way,
                "reward_funcs": {"length": 1.0, "regex": 0.7},
            },
            prompts,
        )
        assert any(row["grad_norm"] > 0 for row in steps) is (not way)


def test_where_no_answer_has_a_reward_the_run_ends(bench: Bench, prompts: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(p, c, r): raise ValueError('never')\n")
    with pytest.raises(
        TrainingError, match=r"none of 6 completions has a reward; the first: .*mine.py:f: ValueError: never"
    ):
        bench.run("grpo", "a", {**DRAWN, "reward_funcs": {f"{file}:f": 1.0}}, prompts)
    file.write_text("def f(p, c, r): return 1e300\n")
    made = RewardFunctions({f"{file}:f": 1.0}, max_completion_length=6, overlong_buffer=0, timeout=1.0)
    from tests.align.test_align import case

    assert made.compute_rewards([case("a")])[0].error.endswith("gave 1e+300")


def test_a_share_stays_between_nothing_and_all() -> None:
    assert wilson_interval(5.5, 6)[2] <= 1
    share, low, high = wilson_interval(1, 1)
    assert share == 1.0
    assert low < 0.3
    assert high == pytest.approx(1.0)


def test_margins_that_are_no_numbers_are_none(pico: Path) -> None:
    tokenizer = load_tokenizer(pico)
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for fields, margin in (
        ({"scores": [None, 3]}, 0.0),
        ({"scores": ["good", "bad"]}, 0.0),
        ({"margin": math.nan}, 0.0),
        ({"margin": True}, 0.0),
        ({"scores": [5, 3]}, 2.0),
        ({"margin": 1.5}, 1.5),
    ):
        made = tokenize_pair(tokenizer, {**row, "extra": {"fields": fields}}, 100)
        assert isinstance(made, PromptCompletions)
        assert made.margin == margin


def test_crossed_examples_are_no_longer_than_may_be_read() -> None:
    long, short = tuple(range(50)), tuple(range(5))
    examples = [
        PromptCompletions("a", long, (CompletionTokens(short, (1,) * 5),)),
        PromptCompletions("b", short, (CompletionTokens(long, (1,) * 50),)),
        PromptCompletions("c", (9, 9), (CompletionTokens(short, (1,) * 5),)),
    ]
    made = mismatch_completions(examples, 60)
    assert max(len(one.ids) for one in made) <= 60
    assert [one.id for one in made] == ["a#other", "b#other", "c#other"]
    assert made[0].completions == examples[2].completions


def test_losses_have_gradients_far_away() -> None:
    for function in (lambda x: f_divergence_scores(x, "forward"), discopop, log_odds):
        x = torch.tensor([-200.0, -100.0, -90.0, -1.0, -1e-9, 0.0], requires_grad=True)
        made = function(x)
        made.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(made).all()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("stage", "config"),
    [("orpo", {}), ("cpo", {}), ("dpo", {"rpo_alpha": 1.0}), ("reward", {"center_rewards_coefficient": 0.5})],
)
def test_held_out_is_the_loss_that_is_trained(stage: str, config: dict[str, Any], bench: Bench, pairs: Dataset) -> None:
    """All pairs in one step, at a rate of nearly nothing: both are the same number."""
    small = {k: v for k, v in SMALL.items() if k != "num_sample_prompts" or stage != "reward"}
    _, steps = bench.run(
        stage, "a", {**small, "batch_size": 64, "num_train_epochs": 1, **config, **SLOWLY}, pairs, eval_data=pairs
    )
    rows = Progress(bench.tmp_path / "a-scratch" / "metrics.jsonl", quiet=True).read_metrics()
    assert next(row["eval_loss"] for row in rows if "eval_loss" in row) == pytest.approx(steps[-1]["loss"], rel=1e-4)


def test_the_same_prompt_twice_in_a_draw_has_other_answers(
    bench: Bench, prompts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an epoch ends within a draw, and where dull prompts are replaced: nothing is drawn twice."""
    seen: list[tuple[Any, ...]] = []
    answers = RolloutSampler.sample_completions

    def noted(self: RolloutSampler, asked: Any, count: int, temperature: float, seeds: Any) -> Any:
        if temperature:
            seen.append(tuple(seeds(at, turn) for at in range(len(asked)) for turn in range(count)))
        return answers(self, asked, count, temperature, seeds)

    monkeypatch.setattr(RolloutSampler, "sample_completions", noted)
    bench.run(
        "grpo",
        "a",
        {
            **DRAWN,
            "batch_size": 4,
            "num_train_epochs": 2,
            "dynamic_sampling_rounds": 2,
            "reward_funcs": {"regex": 1e-12},
        },
        prompts,
    )  # of four prompts each, of six
    assert len(seen) == 3 * 2  # the second round has no prompts left
    assert len({seed for some in seen for seed in some}) == sum(map(len, seen))


def test_held_out_answers_of_one_kind_are_not_ranked(bench: Bench, pairs: Dataset, tmp_path: Path) -> None:
    rows = [
        whole(
            {
                "id": f"s{i}",
                "messages": [{"role": "user", "content": said(i, 3)}, {"role": "assistant", "content": said(i + 1, 2)}],
                "extra": {"label": True},
            }
        )
        for i in range(4)
    ]
    write_chat(tmp_path / "good", rows)
    made, _ = bench.run(
        "kto", "a", {**SMALL, "num_train_epochs": 1}, pairs, eval_data=Dataset(tmp_path / "good", name="good")
    )
    assert "accuracy" not in made.metrics
    assert "all have one label, so there is no accuracy" in bench.report.subtitle


def test_rows_of_steps_that_cannot_be_read_are_set_aside(bench: Bench, tmp_path: Path) -> None:
    good = [{"prompt": f"q {i}", "steps": ["one fox", "two foxes"], "labels": [True, i % 2 == 0]} for i in range(6)]
    bad = [
        {"prompt": None, "steps": ["a"], "labels": [1]},
        {"prompt": "q", "steps": ["a\nb"], "labels": [1]},
        {"prompt": "q", "steps": ["\ud800"], "labels": [1]},
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*good, *bad)))
    made, _ = bench.run(
        "process",
        "a",
        {k: v for k, v in SMALL.items() if k != "num_sample_prompts"},
        Dataset(tmp_path / "steps.jsonl", name="steps"),
    )
    assert made.metrics["rows"] == 6
    assert made.metrics["dropped"] == 3


def test_the_largest_ratio_of_cispo_is_above_one() -> None:
    with pytest.raises(ValidationError, match="epsilon_high is the largest ratio of cispo"):
        GrpoConfig(loss_type="cispo")
    with pytest.raises(ValidationError, match="temperature"):
        GrpoConfig(temperature=1e-40)
