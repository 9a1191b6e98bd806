"""Golden tokens notice what is otherwise silent: another template, a lost stop id, other merges, other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TEMPLATE, make_pico, make_tokenizer

from llmworks.core.artifact import Golden
from llmworks.core.errors import GoldenMismatch
from llmworks.model.golden import make_logits_function, record_golden
from llmworks.model.io.load import load_model
from llmworks.runtime.session import Session
from llmworks.tokenize.chat import golden
from llmworks.tokenize.chat.templates import add_tool_support
from llmworks.tokenize.load import load_tokenizer


@pytest.fixture(scope="module")
def recorded(pico: Path) -> Golden:
    return record_golden(pico)


def test_record_covers_conversations_and_positions(recorded: Golden) -> None:
    assert len(recorded.conversations) == 3
    assert sum(len(c.positions) for c in recorded.conversations) >= 8
    assert all(len(t) == golden.TOP_K for c in recorded.conversations for t in c.top_ids)
    assert recorded.stop_ids == [2]


def test_replays_on_itself(recorded: Golden, pico: Path) -> None:
    tokenizer = load_tokenizer(pico)
    gap = golden.require_replay(
        recorded, tokenizer, [2], make_logits_function(load_model(pico)), mean_tolerance=1e-4, step="test"
    )
    assert gap is not None
    assert gap.top1_agreement == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATE.replace("'<|im_end|>' + '\n'", "'\n'"), "conversation 1"),  # the end-of-turn token is lost
        (
            TEMPLATE.replace("+ '\n' + message['content']", "+ message['content']"),
            "conversation 1",
        ),  # a new line is lost
        (
            TEMPLATE.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant' }}"),
            "different loss mask",
        ),  # the prompt ends early
    ],
)
def test_changed_template_is_noticed(recorded: Golden, template: str, words: str) -> None:
    problems = golden.replay_tokens(recorded, make_tokenizer(template), [2])
    assert problems
    assert words in "; ".join(problems)


def test_lost_stop_id_is_noticed(recorded: Golden, pico: Path) -> None:
    assert "stop ids" in golden.replay_tokens(recorded, load_tokenizer(pico), [0, 2])[0]


def test_tool_aware_template_replays(recorded: Golden) -> None:
    assert golden.replay_tokens(recorded, make_tokenizer(add_tool_support(TEMPLATE)), [2]) == []


def test_other_weights_are_refused(recorded: Golden, tmp_path: Path) -> None:
    other = make_pico(tmp_path / "other", seed=1)
    with pytest.raises(GoldenMismatch, match="nothing was published"):
        golden.require_replay(
            recorded,
            load_tokenizer(other),
            [2],
            make_logits_function(load_model(other)),
            mean_tolerance=0.1,
            step="test",
        )


def test_base_model_without_template_uses_text(tmp_path: Path) -> None:
    made = record_golden(make_pico(tmp_path / "base", template=None))
    assert all(c.text and not c.messages for c in made.conversations)


def test_dates_are_frozen() -> None:
    dated = make_tokenizer("{{ strftime_now('%Y') }}" + TEMPLATE)
    logits: Any = lambda ids: [[0.0] * 400] * len(ids)  # noqa: E731
    made = golden.record_golden(dated, [2], logits)
    assert "2024" in dated.decode(made.conversations[0].ids)


def unrecorded(golden_tokens: Golden, size: int, *, spread: bool = True) -> list[int]:
    """Ids whose logits are recorded nowhere; without `spread`, nowhere among the most probable ones."""
    known = {i for c in golden_tokens.conversations for ids in c.top_ids for i in ids}
    if spread:
        known |= {i for c in golden_tokens.conversations for ids in c.spread_ids for i in ids}
    return [i for i in range(size) if i not in known]


def of_all_unrecorded(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, list[int]], None]:
    def damage(weight: torch.Tensor, ids: list[int]) -> None:
        weight[ids] = change(weight[ids])

    return damage


def nan_in_one(weight: torch.Tensor, ids: list[int]) -> None:
    weight[ids[len(ids) // 2], 0] = float("nan")


def infinite_in_one(weight: torch.Tensor, ids: list[int]) -> None:
    weight[ids[0]] = float("inf")


ROUNDED, FOUR_BITS = 0.05, 3.0  # tolerances (nats) of a model in another precision, of one in 4 bits
DAMAGES = {
    "NaN in one unrecorded row": (nan_in_one, FOUR_BITS),
    "infinite in one unrecorded row": (infinite_in_one, FOUR_BITS),
    "all unrecorded rows 30 times as large": (of_all_unrecorded(lambda rows: 30 * rows), FOUR_BITS),
    "all rows outside of the recorded top zero": (of_all_unrecorded(torch.zeros_like), ROUNDED),
    "all unrecorded rows negated": (of_all_unrecorded(torch.neg), ROUNDED),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.new", {"hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": False}),
    "gpt2": (
        "model.new",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "norm": "layer",
            "bias": "all",
            "position_embedding_type": "learned",
            "gated_mlp": False,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": False,
        },
    ),
    "lstm": ("model.recurrent", {"embedding_dim": 32, "rnn_type": "lstm", "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each architecture with 2,048 embedding rows, most of which no golden token records."""
    folder = tmp_path_factory.mktemp("golden")
    session = Session(folder / "workspace", quiet=True)
    tokenizer = make_pico(folder / "pico")
    return {
        name: session.make(stage, tokenizer=tokenizer, config={"vocab_size": 2048, **config}).path
        for name, (stage, config) in SHAPES.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", DAMAGES)
def test_damage_of_what_is_not_recorded_is_found(models: dict[str, Path], shape: str, what: str) -> None:
    model = load_model(models[shape])
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # of a trained model: of untrained ones all logits are near 0
        head.mul_(60)
    made = golden.record_golden(load_tokenizer(models[shape]), [2], make_logits_function(model))
    damage, tolerance = DAMAGES[what]
    assert golden.replay_logits(made, make_logits_function(model)).find_problem(1e-4) == ""
    ids = unrecorded(made, len(head), spread="outside" not in what)
    assert len(ids) > 500
    with torch.no_grad():
        damage(head, ids)
    gap = golden.replay_logits(made, make_logits_function(model))
    assert gap.find_problem(tolerance) != "", gap


def test_records_before_are_replayed(recorded: Golden, pico: Path) -> None:
    """Without a log-sum-exp and a spread of ids: the top 32 and what needs no record."""
    old = Golden(
        conversations=[
            c.model_copy(update={"logsumexp": [], "spread_ids": [], "spread_logits": []})
            for c in recorded.conversations
        ],
        stop_ids=recorded.stop_ids,
    )
    model = load_model(pico)
    assert golden.replay_logits(old, make_logits_function(model)).find_problem(1e-4) == ""
    with torch.no_grad():
        model.get_output_embeddings().weight[-1] = float("nan")
    assert "NaN" in golden.replay_logits(old, make_logits_function(model)).find_problem(3.0)
