"""Losses on the policy's own answers: TRL's GRPO and RLOO on the same answers, advantages and whitening by hand, and
what PPO does on a bandit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.align.test_losses import RANK, Both, no_engine

from llmworks.align.grpo import GrpoConfig
from llmworks.align.losses.policy import (
    LossType,
    group_advantages,
    kl_divergence,
    leave_one_out,
    log_importance_ratios,
    overlong_penalty,
    policy_loss,
    standard_deviation,
    token_weights,
)
from llmworks.align.losses.ppo import gae, token_rewards, value_loss, whiten
from llmworks.align.preference.objective import MethodContext
from llmworks.align.rl.objective import PolicyLossOptions, RolloutObjective
from llmworks.align.rl.rewards import RewardFunctions
from llmworks.align.rl.rollout import Rollout, RolloutPrompt, SampledCompletion
from llmworks.align.rl.sampling import RolloutOptions, RolloutSampler
from llmworks.align.rloo import compute_advantages
from llmworks.core.context import Context
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.model.io.load import load_model
from llmworks.model.lora import lora
from llmworks.tokenize.load import load_tokenizer
from llmworks.train.finetune.method import TrainingData

PROMPTS, EACH, LONGEST = 2, 3, 12
LENGTHS = (5, 12, 3, 7, 1, 9)
REWARDS = [[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]]


def trainer_of(kind: Any, settings: Any, pico: Path, folder: Path, **options: Any) -> Any:
    from datasets import Dataset as Rows
    from peft import LoraConfig as Peft

    arguments = settings(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        num_generations=EACH,
        max_completion_length=LONGEST,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        **options,
    )
    rows = Rows.from_list([{"prompt": "the fox"}, {"prompt": "what is"}])
    return kind(
        model=load_model(pico),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=rows,
        processing_class=load_tokenizer(pico),
        peft_config=Peft(**RANK, task_type="CAUSAL_LM"),
    )


class Case(Both):
    """The same prompts and answers in TRL and here, with noise between the policy, the one that drew, and the
    reference.
    """

    def __init__(self, trainer: Any, pico: Path) -> None:
        trainer.get_train_dataloader = lambda: [None]
        super().__init__(trainer, pico)
        draw = torch.Generator().manual_seed(7)
        self.prompts = [tuple(torch.randint(3, 300, (4 + 5 * i,), generator=draw).tolist()) for i in range(PROMPTS)]
        self.answers = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in LENGTHS]
        wide, long = max(map(len, self.prompts)), max(LENGTHS)
        self.inputs: dict[str, Any] = {
            "prompt_ids": torch.zeros(6, wide, dtype=torch.long),
            "prompt_mask": torch.zeros(6, wide, dtype=torch.long),
            "completion_ids": torch.zeros(6, long, dtype=torch.long),
            "completion_mask": torch.zeros(6, long, dtype=torch.long),
        }
        for i, answer in enumerate(self.answers):
            prompt = self.prompts[i // EACH]
            self.inputs["prompt_ids"][i, wide - len(prompt) :] = torch.tensor(prompt)  # padded on the left
            self.inputs["prompt_mask"][i, wide - len(prompt) :] = 1
            self.inputs["completion_ids"][i, : len(answer)] = torch.tensor(answer)
            self.inputs["completion_mask"][i, : len(answer)] = 1
        with torch.no_grad():
            found = self.now()
        self.old, self.reference = (found + 0.4 * torch.randn(found.shape, generator=draw) for _ in range(2))

    def now(self) -> torch.Tensor:
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
        mask = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
        found = self.trainer._get_per_token_logps_and_entropies(
            self.trainer.model, ids, mask, self.inputs["completion_ids"].shape[1]
        )
        return found[0]  # type: ignore[no-any-return]

    def rollout(self, *, old: bool = True) -> Rollout:
        drawn = [
            SampledCompletion(
                list(ids),
                "",
                len(ids) == LONGEST,
                REWARDS[i // EACH][i % EACH],
                {},
                [],
                self.old[i, : len(ids)].tolist() if old else [],
                self.reference[i, : len(ids)].tolist(),
            )
            for i, ids in enumerate(self.answers)
        ]
        return Rollout([0, 1], [drawn[:EACH], drawn[EACH:]], {"alike": 0.0})

    def groups(
        self, objective: PolicyLossOptions, advantages: Any, tmp_path: Path, *, passes: int = 2
    ) -> RolloutObjective:
        asked = [RolloutPrompt({"id": str(i)}, (), ids) for i, ids in enumerate(self.prompts)]
        ctx = Context(tmp_path, tmp_path, 0, Progress(quiet=True), ReportBuilder(), no_engine)
        given = MethodContext(
            GrpoConfig(),
            self.moved(self.fresh()),
            TrainingData(load_tokenizer(self.pico), [], asked, [], [], []),
            ctx,
            torch.device("cpu"),
        )
        rewards = RewardFunctions({"length": 1.0}, max_completion_length=LONGEST, overlong_buffer=0, timeout=1.0)
        made = RolloutObjective(
            given,
            RolloutSampler(given, asked, rewards, RolloutOptions(EACH, 1.0, LONGEST, 2, 2, 1, passes, False)),
            objective,
            advantages,
        )
        made.record_rollout = lambda number, rollout: None  # type: ignore[method-assign]
        return made

    def held(self, loss: Any, groups: RolloutObjective, made: Rollout) -> None:
        """Loss and gradients, of the whole step and of its parts."""
        for p in self.named.values():
            p.grad = None
        loss.backward()
        groups.process_rollout(0, made)
        network = groups.context.tuned.network
        for parts in ([[0, 1]], [[1], [0]]):
            network.zero_grad()
            total = sum(groups.loss(network, groups.collate(made, part, [0, 1])) for part in parts) / len(self.answers)
            assert isinstance(total, torch.Tensor)
            total.backward()
            assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
            for name, layer in lora.iter_lora_layers(network):
                there = self.named[f"base_model.model.{groups.context.tuned.rename(name)}.lora_B.default.weight"].grad
                assert there is not None
                assert layer.b.grad is not None
                assert float((layer.b.grad - there).norm() / there.norm()) < 2e-4, name


@pytest.fixture(scope="module")
def grpos(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from trl import GRPOConfig, GRPOTrainer

    return Case(trainer_of(GRPOTrainer, GRPOConfig, pico, tmp_path_factory.mktemp("grpo")), pico)


PLAIN: dict[str, Any] = {
    "loss_type": "grpo",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "importance_sampling_level": "token",
    "use_bias_correction_kl": False,
}
GRPO: list[tuple[PolicyLossOptions, dict[str, Any]]] = [
    (PolicyLossOptions(), {}),
    (PolicyLossOptions(aggregation="token-mean", epsilon_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    (PolicyLossOptions(aggregation="token-mean"), {"loss_type": "bnpo"}),
    (PolicyLossOptions(aggregation="seq-mean-token-sum-norm"), {"loss_type": "dr_grpo"}),
    (PolicyLossOptions(importance_sampling_level="sequence"), {"importance_sampling_level": "sequence"}),
    (
        PolicyLossOptions(aggregation="seq-mean-token-sum", importance_sampling_level="sequence"),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    (
        PolicyLossOptions(loss_type="cispo", aggregation="token-mean", epsilon_high=1.1),
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    (PolicyLossOptions(loss_type="sapo"), {"loss_type": "sapo"}),
    (PolicyLossOptions(loss_type="vespo", aggregation="token-mean"), {"loss_type": "vespo"}),
    (PolicyLossOptions(kl_coef=0.04), {"beta": 0.04}),
    (PolicyLossOptions(kl_coef=0.3, use_bias_correction_kl=True), {"beta": 0.3, "use_bias_correction_kl": True}),
    (PolicyLossOptions(delta=1.05), {"delta": 1.05}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    GRPO,
    ids=lambda value: "-".join(f"{k}" for k in value.values()) or "grpo" if isinstance(value, dict) else "",
)
def test_grpo_is_trl_s(
    ours: PolicyLossOptions, theirs: dict[str, Any], grpos: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**PLAIN, **theirs}.items():
        monkeypatch.setattr(grpos.trainer if hasattr(grpos.trainer, name) else grpos.trainer.args, name, value)
    monkeypatch.setattr(grpos.trainer, "current_gradient_accumulation_steps", 1, raising=False)
    advantages = group_advantages(torch.tensor(REWARDS))
    inputs = {
        **grpos.inputs,
        "advantages": advantages.flatten(),
        "old_per_token_logps": grpos.old,
        "ref_per_token_logps": grpos.reference,
        "num_items_in_batch": grpos.inputs["completion_mask"].sum(),
    }
    loss = grpos.trainer._compute_loss(grpos.trainer.model.train(), inputs)
    grpos.held(loss, grpos.groups(ours, lambda _: advantages, tmp_path), grpos.rollout())


@pytest.mark.filterwarnings("ignore")
def test_without_old_chances_the_policy_is_the_one_that_drew(
    grpos: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL skips them, too, where every draw is used once: ratios are 1 and have a gradient."""
    for name, value in PLAIN.items():
        monkeypatch.setattr(grpos.trainer if hasattr(grpos.trainer, name) else grpos.trainer.args, name, value)
    monkeypatch.setattr(grpos.trainer, "current_gradient_accumulation_steps", 1, raising=False)
    advantages = group_advantages(torch.tensor(REWARDS), "batch")
    loss = grpos.trainer._compute_loss(
        grpos.trainer.model.train(), {**grpos.inputs, "advantages": advantages.flatten()}
    )
    grpos.held(
        loss, grpos.groups(PolicyLossOptions(), lambda _: advantages, tmp_path, passes=1), grpos.rollout(old=False)
    )


@pytest.mark.filterwarnings("ignore")
def test_rloo_is_trl_s(pico: Path, tmp_path: Path) -> None:
    from trl import RLOOConfig, RLOOTrainer

    case = Case(trainer_of(RLOOTrainer, RLOOConfig, pico, tmp_path / "trl", beta=0.1), pico)
    made = case.rollout()
    advantages = compute_advantages(made, 0.1, whiten=False)
    mask = case.inputs["completion_mask"]
    away = ((case.old - case.reference) * mask).sum(1)
    rewards = torch.tensor(REWARDS).flatten() - 0.1 * away
    others = [[rewards[j] for j in range(6) if j // EACH == i // EACH and j != i] for i in range(6)]
    assert torch.allclose(
        advantages.flatten(), torch.stack([rewards[i] - sum(o) / len(o) for i, o in enumerate(others)]), atol=1e-5
    )
    inputs = {**case.inputs, "advantages": advantages.flatten(), "old_logps": (case.old * mask).sum(1)}
    loss = case.trainer._compute_loss(case.trainer.model.train(), inputs)
    case.held(
        loss,
        case.groups(PolicyLossOptions("clip", "seq-mean-token-mean", "sequence", True), lambda _: advantages, tmp_path),
        made,
    )


def test_an_answer_that_was_cut_off_is_left_out_where_that_is_wanted(grpos: Case, tmp_path: Path) -> None:
    """The longest answer was cut off: with it the loss is of all, without it as if it had not been drawn, but for the
    others' advantages.
    """
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, -0.3]])
    found = {}
    for whole in (True, False):
        groups = grpos.groups(
            PolicyLossOptions(aggregation="token-mean", train_on_truncated=whole), lambda _: advantages, tmp_path
        )
        made = grpos.rollout()
        groups.process_rollout(0, made)
        batch = groups.collate(made, [0, 1], [0, 1])
        assert batch.extras["tokens"] == sum(LENGTHS) - (0 if whole else LONGEST)
        counted = groups._token_weights(batch)
        assert bool((counted[batch.owner == 1] == 0).all()) is not whole
        found[whole] = counted
    assert float(found[True].sum()) == pytest.approx(6.0)  # so that the sum over the answers is a mean over tokens
    assert float(found[False].sum()) == pytest.approx(6.0)

    # pure functions


def test_forms_are_those_of_the_stage() -> None:
    """A name that the stage takes and the loss does not know would be trained as something else."""
    forms = get_args(GrpoConfig.model_fields["loss_type"].annotation)
    assert forms == get_args(LossType)
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown loss type 'gspo'"):
        policy_loss(one, one, one, torch.zeros(1, dtype=torch.long), torch.ones(1), loss_type="gspo")  # type: ignore[arg-type]


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, math.nan, 3.0, math.nan]])
    found = group_advantages(rewards)
    sample = torch.tensor([1.0, 0.0, 0.0, 1.0]).std()
    assert torch.allclose(found[0], (rewards[0] - 0.5) / (sample + 1e-4))
    assert found[1].tolist() == [0.0] * 4  # nothing to learn
    assert found[2].tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 0.0, 1 / (2**0.5 + 1e-4), 0.0])
    assert torch.equal(group_advantages(rewards, "none")[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    known = rewards[~rewards.isnan()]
    assert torch.allclose(group_advantages(rewards, "batch")[0, 0], 0.5 / (known.std() + 1e-4))
    assert leave_one_out(rewards)[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out(rewards)[2].tolist() == [-2.0, 0.0, 2.0, 0.0]
    assert leave_one_out(torch.tensor([[4.0, math.nan]])).tolist() == [[0.0, 0.0]]


@pytest.mark.filterwarnings("ignore")
def test_the_deviation_is_trl_s() -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 2.5, 0.0, 1.0], [1.0, math.nan, 3.0, 7.0]])
    assert torch.allclose(standard_deviation(rewards)[:, 0], nanstd(rewards, dim=1))


def test_distance_and_overlong() -> None:
    assert kl_divergence(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0.0
    assert kl_divergence(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == pytest.approx(math.exp(-1) + 1 - 1)
    assert overlong_penalty(torch.tensor([10.0, 16.0, 18.0, 20.0, 25.0]), 20, 4).tolist() == [
        0.0,
        0.0,
        -0.5,
        -1.0,
        -1.0,
    ]


def test_two_tokens_by_hand() -> None:
    """An answer of two tokens, worth 1; kl 0.1; gamma 1, lambda 0.95. Worked out with a pencil."""
    owner = torch.tensor([0, 0])
    rewards = token_rewards(
        torch.tensor([1.0]), torch.tensor([-1.0, -0.5]), torch.tensor([-1.2, -0.9]), owner, kl_coef=0.1
    )
    assert rewards.tolist() == pytest.approx([-0.02, 0.96])
    values = torch.tensor([0.5, 0.4])
    advantages, returns = gae(rewards, values, owner, gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == pytest.approx([-0.02 + 0.4 - 0.5 + 0.95 * 0.56, 0.96 - 0.4])
    assert returns.tolist() == pytest.approx([0.5 + 0.412, 0.96])
    now = torch.tensor([-0.7, -0.9])  # ratios e^0.3 = 1.35 and e^-0.4 = 0.67
    log = log_importance_ratios(now, torch.tensor([-1.0, -0.5]), owner, torch.tensor([2]), "token")
    found = policy_loss(now, log, advantages, owner, torch.tensor([2]))
    assert found.loss.tolist() == pytest.approx(
        [-1.2 * 0.412, -math.exp(-0.4) * 0.56]
    )  # the first is held at 1.2, the second may come back
    assert found.clipped.tolist() == [True, False]
    assert value_loss(torch.tensor([1.5, 0.45]), values, returns, 0.2).tolist() == pytest.approx(
        [0.5 * max((1.5 - 0.912) ** 2, (0.7 - 0.912) ** 2), 0.5 * (0.45 - 0.96) ** 2]
    )
    assert (
        token_weights(
            owner, torch.tensor([2]), "seq-mean-token-mean", num_completions=1, num_tokens=2, max_completion_length=8
        )
        * found.loss
    ).sum().item() == pytest.approx(found.loss.mean().item())


def test_gae_has_its_closed_forms() -> None:
    """lambda 1: what comes later less what was expected; lambda 0: one surprise; no answer sees the next."""
    draw = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(9, generator=draw) for _ in range(2))
    owner = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])
    whole, _ = gae(rewards, values, owner, gamma=0.9, gae_lambda=1.0)
    once, _ = gae(rewards, values, owner, gamma=0.9, gae_lambda=0.0)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        for t in range(start, end):
            assert float(whole[t]) == pytest.approx(
                sum(0.9 ** (k - t) * float(rewards[k]) for k in range(t, end)) - float(values[t]), abs=1e-5
            )
            assert float(once[t]) == pytest.approx(
                float(rewards[t]) + (0.9 * float(values[t + 1]) if t + 1 < end else 0.0) - float(values[t]), abs=1e-5
            )


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    made = whiten(x)
    assert float(made.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(made.var(correction=0)) == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(whiten(x, center=False), made + 3.0)


@pytest.mark.parametrize("form", ["clip", "cispo", "vespo"])
def test_a_bandit_is_learned(form: Any) -> None:
    """Three arms, worth 0, 0.5 and 1.

    The first step's gradient is that of the expected reward, which is known; many steps find the best arm.
    """
    worth, logits = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.3, 0.1, -0.2], requires_grad=True)
    chances = logits.softmax(0).detach()
    exact = chances * (worth - (chances * worth).sum())  # of the expected reward, by each logit
    draw = torch.Generator().manual_seed(1)
    arms = torch.multinomial(chances, 40_000, replacement=True, generator=draw)
    gained = worth[arms] - worth[arms].mean()
    owner = torch.arange(len(arms))
    chosen = logits.log_softmax(0)[arms]
    policy_loss(
        chosen,
        chosen - chosen.detach(),
        gained,
        owner,
        torch.ones_like(owner),
        loss_type=form,
        epsilon_high=1.2 if form == "cispo" else 0.2,
    ).loss.mean().backward()
    assert logits.grad is not None
    assert torch.allclose(-logits.grad, exact, atol=0.01)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(60):
        arms = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=draw)
        old, gained = logits.detach().log_softmax(0)[arms], whiten(worth[arms])
        for _ in range(4):
            optimizer.zero_grad()
            chosen = logits.log_softmax(0)[arms]
            policy_loss(
                chosen,
                chosen - old,
                gained,
                torch.arange(64),
                torch.ones(64, dtype=torch.long),
                loss_type=form,
                epsilon_high=1.2 if form == "cispo" else 0.2,
            ).loss.mean().backward()
            optimizer.step()
    assert float(logits.softmax(0)[2].detach()) > 0.9
