"""Golden tokens notice what is otherwise silent: another template, a lost stop id, other merges, other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_pico, make_tokenizer

from llmworks.core.artifact import Golden
from llmworks.core.errors import GoldenMismatch
from llmworks.model.golden import make_logits_function, record_golden
from llmworks.model.io.load import load_model
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
