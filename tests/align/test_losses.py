"""Losses and gradients of alignment, held against TRL's trainers on the same batch: every kind that both have; and what
no trainer of TRL's can show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TEMPLATE

from llmworks.align import cpo, dpo, kto, orpo, simpo
from llmworks.align.losses.orpo import log_odds
from llmworks.align.losses.simpo import alpha_reward
from llmworks.align.preference.batch import collate_padded, collate_shared_prompts
from llmworks.align.preference.examples import CompletionTokens, PromptCompletions, tokenize_pair
from llmworks.align.preference.logprobs import compute_logprobs
from llmworks.align.preference.objective import MISMATCHED, MethodContext, mismatch_completions
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.model.io.load import load_model
from llmworks.model.lora import lora
from llmworks.tokenize.load import load_tokenizer
from llmworks.train.finetune.lora_config import LoraConfig
from llmworks.train.finetune.method import TrainingData
from llmworks.train.finetune.trainable import TrainableModel, open_trainable_model

WITHOUT_BREAK = TEMPLATE.replace(
    "'<|im_end|>' + '\n'", "'<|im_end|>'"
)  # TRL weighs what a template writes after an answer's end, too
RANK = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
WORDS = ["the", "quick", "brown", "fox", "user", "weather", "Oslo", "what", "is", "name", "city"]


def said(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed % 3 + 1)) % 11] for i in range(count))


PAIRS = [
    {
        "id": f"p{i}",
        "prompt": [{"role": "user", "content": said(i, 3 + i % 4)}],
        "chosen": [{"role": "assistant", "content": said(i + 5, 2 + i % 5)}],
        "rejected": [{"role": "assistant", "content": said(i + 9, 1 + (i * 2) % 6)}],
    }
    for i in range(8)
]
SINGLES = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]


def no_engine(_: Any) -> Any:
    raise LlmworksError("none is needed")


class Both:
    """The same policy, an adapter that is not what it began as, in TRL and here; and a batch of TRL's."""

    def __init__(self, trainer: Any, pico: Path) -> None:
        self.trainer, self.pico = trainer, pico
        torch.manual_seed(3)
        self.named = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, p in self.named.items():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        (self.batch,) = list(trainer.get_train_dataloader())

    def fresh(self) -> TrainableModel:
        """A policy at its beginning."""
        tuned = open_trainable_model(self.pico)
        tuned.add_adapter(LoraConfig(r=4, lora_alpha=8.0))
        return tuned

    def moved(self, tuned: TrainableModel) -> TrainableModel:
        """The same where TRL's is."""
        with torch.no_grad():
            for name, layer in lora.iter_lora_layers(tuned.network):
                for ours, theirs in ((layer.a, "lora_A"), (layer.b, "lora_B")):
                    ours.copy_(self.named[f"base_model.model.{tuned.rename(name)}.{theirs}.default.weight"])
        return tuned

    def given(self, config: Any, examples: list[PromptCompletions], tmp_path: Path) -> MethodContext:
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        for file in scratch.iterdir():
            file.unlink()
        ctx = Context(tmp_path, scratch, 0, Progress(quiet=True), ReportBuilder(), no_engine)
        return MethodContext(
            config, self.fresh(), TrainingData(None, [], examples, [], [], []), ctx, torch.device("cpu")
        )

    def compare(self, loss: Any, given: MethodContext, way: Any, examples: list[PromptCompletions]) -> None:
        """The loss, and the gradients of all adapters."""
        for p in self.named.values():
            p.grad = None
        loss.backward()
        tuned = self.moved(given.tuned)
        batch = way.collate(examples, examples)
        ours = way.loss(tuned.network.train(), batch) / batch.labels
        ours.backward()
        assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
        for name, layer in lora.iter_lora_layers(tuned.network):
            for mine, theirs in ((layer.a.grad, "lora_A"), (layer.b.grad, "lora_B")):
                there = self.named[f"base_model.model.{tuned.rename(name)}.{theirs}.default.weight"].grad
                assert mine is not None
                assert there is not None
                assert float(there.norm()) > 0
                assert float((mine - there).norm() / there.norm()) < 1e-4, (name, theirs)


def trainer_of(kind: Any, settings: Any, rows: list[dict[str, Any]], pico: Path, folder: Path, **options: Any) -> Any:
    from datasets import Dataset as Rows
    from peft import LoraConfig as Peft

    tokenizer = load_tokenizer(pico)
    tokenizer.chat_template = WITHOUT_BREAK
    arguments = settings(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        **options,
    )
    return kind(
        model=load_model(pico),
        args=arguments,
        train_dataset=Rows.from_list(rows),
        processing_class=tokenizer,
        peft_config=Peft(**RANK, task_type="CAUSAL_LM"),
    )


def example(id: str, *texts: tuple[list[int], list[int]], good: bool = True) -> PromptCompletions:
    """Of (ids, 1 where a token is weighed): the prompt is what all share before that."""
    begins = min(mask.index(1) for _, mask in texts)
    return PromptCompletions(
        id,
        tuple(texts[0][0][:begins]),
        tuple(CompletionTokens(tuple(ids[begins:]), tuple(mask[begins:])) for ids, mask in texts),
        good,
    )


def texts_of(ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    return [
        (row[there].tolist(), weighed[there].long().tolist())
        for row, there, weighed in zip(ids, attention.bool(), mask, strict=True)
    ]


def pairs_of(batch: Any) -> list[PromptCompletions]:
    """Pairs of TRL's batch, in which all chosen sides come first."""
    texts = texts_of(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    half = len(texts) // 2
    return [example(f"p{i}", texts[i], texts[half + i]) for i in range(half)]


@pytest.fixture(scope="module")
def dpos(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    from trl import DPOConfig, DPOTrainer

    return Both(
        trainer_of(
            DPOTrainer,
            DPOConfig,
            [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in PAIRS],
            pico,
            tmp_path_factory.mktemp("dpo"),
            train_sampling_strategy="sequential",
        ),
        pico,
    )


DPO: list[tuple[dict[str, Any], dict[str, Any]]] = [  # ours, and what TRL's trainer is set to
    ({}, {}),
    ({"beta": 0.5}, {"beta": 0.5}),
    ({"loss_type": "hinge"}, {"loss_types": ["hinge"]}),
    ({"loss_type": "ipo"}, {"loss_types": ["ipo"]}),
    ({"loss_type": "sigmoid_norm"}, {"loss_types": ["sigmoid_norm"]}),
    ({"loss_type": "robust", "label_smoothing": 0.1}, {"loss_types": ["robust"], "label_smoothing": 0.1}),
    ({"loss_type": "exo_pair", "label_smoothing": 0.01}, {"loss_types": ["exo_pair"], "label_smoothing": 0.01}),
    ({"loss_type": "nca_pair"}, {"loss_types": ["nca_pair"]}),
    ({"loss_type": "bco_pair"}, {"loss_types": ["bco_pair"]}),
    ({"loss_type": "sppo_hard"}, {"loss_types": ["sppo_hard"]}),
    ({"loss_type": "apo_zero"}, {"loss_types": ["apo_zero"]}),
    ({"loss_type": "apo_down"}, {"loss_types": ["apo_down"]}),
    ({"loss_type": "discopop"}, {"loss_types": ["discopop"]}),
    ({"loss_type": "aot", "label_smoothing": 0.1}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
    ({"loss_type": "aot_unpaired"}, {"loss_types": ["aot_unpaired"]}),
    ({"f_divergence_type": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    (
        {"f_divergence_type": "js_divergence", "loss_type": "hinge"},
        {"f_divergence_type": "js_divergence", "loss_types": ["hinge"]},
    ),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    ({"precompute_ref_log_probs": False, "beta": 0.2}, {"beta": 0.2}),
    ({"rpo_alpha": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
]
PLAIN: dict[str, Any] = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"), DPO, ids=["-".join(map(str, ours.values())) or "sigmoid" for ours, _ in DPO]
)
def test_the_family_of_dpo_is_trl_s(
    ours: dict[str, Any], theirs: dict[str, Any], dpos: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's reference is its adapter switched off; ours was computed before the first step, or is switched off, too."""
    for name, value in {**PLAIN, **theirs}.items():
        monkeypatch.setattr(dpos.trainer, name, value)
    examples = pairs_of(dpos.batch)
    config = dpo.DpoConfig.model_validate(ours)
    given = dpos.given(config, examples, tmp_path)
    way = dpo.build_method(config, given)
    dpos.compare(dpos.trainer._compute_loss(dpos.trainer.model.train(), dpos.batch, False), given, way, examples)


@pytest.mark.filterwarnings("ignore")
def test_pairs_are_read_as_trl_reads_them(dpos: Both) -> None:
    tokenizer = load_tokenizer(dpos.pico)
    tokenizer.chat_template = WITHOUT_BREAK
    theirs = {tuple(sorted(answer.ids for answer in pair.completions)): pair for pair in pairs_of(dpos.batch)}
    for row in PAIRS:
        made = tokenize_pair(tokenizer, row, 512)
        assert isinstance(made, PromptCompletions)
        pair = theirs[tuple(sorted(answer.ids for answer in made.completions))]
        assert (made.prompt, made.completions) == (pair.prompt, pair.completions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"loss_type": "kto"}),
        (
            {"desirable_weight": 0.7, "undesirable_weight": 1.3, "beta": 0.4},
            {"loss_type": "kto", "desirable_weight": 0.7, "undesirable_weight": 1.3, "beta": 0.4},
        ),
        ({"loss_type": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_kto_is_trl_s(ours: dict[str, Any], theirs: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    both = Both(
        trainer_of(
            KTOTrainer, KTOConfig, SINGLES, pico, tmp_path / "trl", train_sampling_strategy="sequential", **theirs
        ),
        pico,
    )
    batch = both.batch
    texts = texts_of(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    examples = [
        example(f"r{i}", text, good=bool(good))
        for i, (text, good) in enumerate(zip(texts, batch["label"], strict=True))
    ]
    if "KL_input_ids" in batch:
        others = texts_of(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
        made = {e.id: e for e in mismatch_completions(examples, 10_000)}
        for number, text in enumerate(others):  # the same prompts with the same others' answers
            assert made[f"r{number}{MISMATCHED}"].ids == example("", text).ids
    config = kto.KtoConfig.model_validate(ours)
    given = both.given(config, examples, tmp_path)
    way = kto.build_method(config, given)
    both.compare(both.trainer._compute_loss(both.trainer.model.train(), batch, False), given, way, examples)


def labelled(batch: Any) -> list[PromptCompletions]:
    """Pairs of a batch of TRL's older trainers."""
    sides = [
        texts_of(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
        for side in ("chosen", "rejected")
    ]
    return [example(f"p{i}", *texts) for i, texts in enumerate(zip(*sides, strict=True))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_orpo_is_trl_s(weight: float, pico: Path, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    both = Both(
        trainer_of(
            ORPOTrainer,
            ORPOConfig,
            PAIRS,
            pico,
            tmp_path / "trl",
            beta=weight,
            max_length=512,
            remove_unused_columns=False,
        ),
        pico,
    )
    examples = labelled(both.batch)
    config = orpo.OrpoConfig(orpo_lambda=weight, train_on_prompts=True)
    given = both.given(config, examples, tmp_path)
    both.compare(
        both.trainer.get_batch_loss_metrics(both.trainer.model.train(), both.batch)[0],
        given,
        orpo.build_method(config, given),
        examples,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (cpo.CpoConfig(), {}),
        (cpo.CpoConfig(loss_type="hinge", cpo_alpha=0.3), {"loss_type": "hinge", "cpo_alpha": 0.3}),
        (cpo.CpoConfig(loss_type="ipo"), {"loss_type": "ipo"}),
        (cpo.CpoConfig(label_smoothing=0.1, beta=0.4), {"label_smoothing": 0.1, "beta": 0.4}),
        (simpo.SimpoConfig(simpo_gamma=0.7), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
        (
            simpo.SimpoConfig(alpha=0.2, cpo_alpha=0.5),
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.2, "cpo_alpha": 0.5},
        ),
    ],
)
def test_cpo_and_simpo_are_trl_s(config: Any, theirs: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    both = Both(
        trainer_of(
            CPOTrainer, CPOConfig, PAIRS, pico, tmp_path / "trl", max_length=512, remove_unused_columns=False, **theirs
        ),
        pico,
    )
    examples = labelled(both.batch)
    given = both.given(config, examples, tmp_path)
    way = (simpo if isinstance(config, simpo.SimpoConfig) else cpo).build_method(config, given)
    both.compare(both.trainer.get_batch_loss_metrics(both.trainer.model.train(), both.batch)[0], given, way, examples)


# batches


EXAMPLES = [
    example(
        f"e{i}",
        *[
            (
                [3 + (j * 5 + i) % 300 for j in range(4 + 11 * i)]
                + [7 + (j * (k + 3)) % 300 for j in range(3 + 20 * k + i)],
                [0] * (4 + 11 * i) + [int(j % 4 != 1) for j in range(3 + 20 * k + i)],
            )
            for k in range(1 + i % 3)
        ],
    )
    for i in range(6)
]


@pytest.mark.parametrize("prompts", [False, True])
def test_a_prompt_that_is_read_once_is_as_good_as_one_before_every_answer(prompts: bool, pico: Path) -> None:
    """The tree of a prompt and its answers in one row, padded rows in transformers, and each text in a row of its own:
    the same chances, and the same gradients of all weights.
    """
    found = []
    for parts in (
        [collate_shared_prompts(EXAMPLES, include_prompts=prompts)],
        [collate_padded(EXAMPLES, include_prompts=prompts)],
        [collate_shared_prompts([e], include_prompts=prompts) for e in EXAMPLES],
    ):
        tuned = open_trainable_model(pico)
        network = (load_model(pico) if parts[0].positions is None else tuned.network).train()
        made = [compute_logprobs(network, batch) for batch in parts]
        chances, entropy, spoken = (torch.cat(values) for values in zip(*made, strict=True))
        sum(((torch.arange(len(x)) % 7 - 2.0) * x).sum() for x in (chances, spoken)).backward()
        found.append(
            (
                chances,
                entropy,
                spoken,
                {
                    (
                        name
                        if parts[0].positions is None
                        else f"{tuned.rename(name.rpartition('.')[0])}.{name.rpartition('.')[2]}"
                    ): p.grad
                    for name, p in network.named_parameters()
                },
            )
        )
        assert len(spoken) == (sum(len(e.prompt) - 1 for e in EXAMPLES) if prompts else 0)
    for chances, entropy, spoken, gradients in found[1:]:
        for one, other in ((chances, found[0][0]), (entropy, found[0][1]), (spoken, found[0][2])):
            assert torch.allclose(one, other, atol=2e-4)
        for name, gradient in gradients.items():
            assert gradient is not None
            there = found[0][3][name]
            assert float((gradient - there).norm() / there.norm()) < 1e-4, name
    assert (
        sum(b.tokens for b in [collate_shared_prompts(EXAMPLES)]) < collate_padded(EXAMPLES).tokens
    )  # and less is read


def test_an_answer_weighs_its_own_tokens_only() -> None:
    batch = collate_shared_prompts(EXAMPLES)
    answers = [answer for e in EXAMPLES for answer in e.completions]
    assert batch.token_counts.tolist() == [answer.num_label_tokens for answer in answers]
    for number, answer in enumerate(answers):
        assert batch.target_ids[batch.owner == number].tolist() == [
            i for i, m in zip(answer.ids, answer.mask, strict=True) if m
        ]
    assert torch.equal(batch.sum_by_completion(torch.ones(len(batch.owner))), batch.token_counts.float())


# accumulation


@pytest.mark.parametrize(
    "make",
    [lambda: dpo.DpoConfig(rpo_alpha=0.5, ld_alpha=0.5), lambda: orpo.OrpoConfig(train_on_prompts=True), kto.KtoConfig],
)
def test_parts_of_a_step_are_the_step(make: Callable[[], Any], pico: Path, tmp_path: Path, dpos: Both) -> None:
    """Means over tokens, and the distance from the reference, are of the whole step."""
    examples = pairs_of(dpos.batch)
    config = make()
    method = {"DpoConfig": dpo, "OrpoConfig": orpo, "KtoConfig": kto}[type(config).__name__]
    if method is kto:
        examples = [
            PromptCompletions(e.id, e.prompt, (e.completions[i % 2],), desirable=not i % 2)
            for i, e in enumerate(examples)
        ]
    found = []
    for size in (8, 3):
        given = dpos.given(config, examples, tmp_path)
        way = method.build_method(config, given)
        dpos.moved(given.tuned)
        total = torch.zeros(())
        for at in range(0, 8, size):
            total = total + way.loss(given.tuned.network, way.collate(examples[at : at + size], examples))
        total.backward()
        found.append(
            (
                total.detach(),
                torch.cat(
                    [
                        layer.b.grad.flatten()
                        for _, layer in lora.iter_lora_layers(given.tuned.network)
                        if layer.b.grad is not None
                    ]
                ),
            )
        )
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-4


# pure functions


def test_bent_and_odds() -> None:
    means = torch.tensor([-0.01, -0.5, -0.8, -4.0])
    assert torch.allclose(alpha_reward(means, 1e-6), means, atol=1e-3)
    assert torch.equal(alpha_reward(means, 0.0), means)
    p = means.double().exp()
    assert torch.allclose(log_odds(means).double(), (p / (1 - p)).log(), atol=1e-5)
