"""Texts read as a tree get the log-probabilities that each gets alone, and what they share is read once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llmworks.generate.decode import prefix_tree as tree
from llmworks.generate.decode.kv_cache import create_growing_cache


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    )


def mistral() -> Any:
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=200,
            initializer_range=0.3,
        )
    )


def texts() -> tuple[list[list[int]], list[int]]:
    """Ten questions behind the same examples, four choices each; one text twice, one that another begins with, one of a
    single token.
    """
    draw = random.Random(0)

    def some(least: int, most: int) -> list[int]:
        return [draw.randrange(300) for _ in range(draw.randint(least, most))]

    examples, given, begins = some(90, 90), [], []
    for _ in range(10):
        question = examples + some(3, 30)
        for _ in range(4):
            given.append(question + some(1, 9))
            begins.append(len(question))
    given += [list(given[0]), given[5][:60], [7], some(40, 40)]
    begins += [1, 1, 1, 3]
    return given, begins


@pytest.mark.parametrize("make", [llama, gpt2, mistral])
@pytest.mark.parametrize("row", [5, 64, 100_000])
def test_each_text_is_scored_as_if_alone(make: Callable[[], Any], row: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    given, begins = texts()
    assert tree.supports_tree_attention(model, max(map(len, given)))
    found = tree.score_sequences(model, create_growing_cache(), given, begins, row)
    for text, begin, ours in zip(given, begins, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([text])).logits[0].log_softmax(-1)
        assert ours.logprobs == pytest.approx([float(alone[i - 1, text[i]]) for i in range(begin, len(text))], abs=1e-4)
        assert ours.greedy == all(int(alone[i - 1].argmax()) == text[i] for i in range(begin, len(text)))


@pytest.mark.parametrize("row", [64, 512])
def test_what_is_shared_is_read_once(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    given, begins = texts()
    read: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **more: (read.append(more["input_ids"].numel()), forward(**more))[1])
    tree.score_sequences(model, create_growing_cache(), given, begins, row)
    assert sum(read) == len(
        {tuple(text[:end]) for text in given for end in range(1, len(text))}
    )  # of a last token nobody asks what follows
    assert max(read) <= row


def test_only_what_is_asked_for_is_computed() -> None:
    (branch,) = tree.build_prefix_tree([[1, 2, 3, 4], [1, 2, 3, 5]], [3, 3])
    assert (branch.ids, [b.ids for b in branch.children], branch.size) == ([1, 2, 3], [[4], [5]], 3)
    model = llama().eval()
    tree._compute_branches(model, create_growing_cache(), [branch], 512)
    assert all(map(math.isnan, branch.logprobs))
    assert not any(math.isnan(b.logprobs[0]) for b in branch.children)


def test_models_that_hide_more_are_read_alone() -> None:
    assert not tree.supports_tree_attention(mistral(), 201)
    assert tree.supports_tree_attention(mistral(), 200)
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.model.nn.recurrent import RecurrentForCausalLM, RecurrentModelConfig
    from llmworks.model.shape import RecurrentShape, Shape

    assert not tree.supports_tree_attention(
        DecoderForCausalLM(
            DecoderConfig(
                shape=Shape(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1).model_dump()
            )
        ),
        8,
    )
    assert not tree.supports_tree_attention(
        RecurrentForCausalLM(RecurrentModelConfig(shape=RecurrentShape(vocab_size=64).model_dump())), 8
    )
