"""Texts that begin alike in one segment: each is computed as if it stood alone, whatever the attention and the
positions are; and log-probabilities without logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmworks.model.loss import linear_cross_entropy as linear_loss
from llmworks.model.loss import linear_logprobs
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape

SHAPES = [
    Shape(num_key_value_heads=2),
    Shape(sliding_window=6, global_attn_every_n_layers=2),
    Shape(position_embedding_type="alibi"),
    Shape(position_embedding_type="learned", norm="layer", gated_mlp=False, bias="all"),
    Shape(sliding_window=6, use_qk_norm=True),
]
TEXTS = [(70, (40, 50, 3)), (5, (9,)), (33, (80, 64))]  # tokens of what is shared, and of each rest


def made(shape: Shape) -> DecoderForCausalLM:
    torch.manual_seed(0)
    small = shape.model_copy(
        update={
            "vocab_size": 100,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
        }
    )
    return DecoderForCausalLM(DecoderConfig(shape=small.model_dump()))


def one_row() -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, list[tuple[int, int]]]]]:
    """(the row, each text with where its parts stand in it)."""
    draw = torch.Generator().manual_seed(1)
    row: dict[str, list[torch.Tensor]] = {"ids": [], "positions": [], "segments": [], "branches": []}
    texts = []
    at = 0
    for number, (shared, rests) in enumerate(TEXTS):
        start, trunk = at, torch.randint(0, 100, (shared,), generator=draw)
        for branch, (ids, first) in enumerate(
            [(trunk, 0), *((torch.randint(0, 100, (n,), generator=draw), shared) for n in rests)]
        ):
            for name, values in (
                ("ids", ids),
                ("positions", torch.arange(first, first + len(ids))),
                ("segments", torch.full_like(ids, number)),
                ("branches", torch.full_like(ids, branch)),
            ):
                row[name].append(values)
            if branch:
                texts.append((torch.cat([trunk, ids]), [(start, start + shared), (at, at + len(ids))]))
            at += len(ids)
    return {name: torch.cat(values)[None] for name, values in row.items()}, texts


@pytest.mark.parametrize("kernels", ["blocks", "fused"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.position_embedding_type}-{s.sliding_window}")
def test_a_branch_is_computed_as_if_it_stood_alone(shape: Shape, kernels: str) -> None:
    """States, and gradients of all weights: of one row, and of a row for each text.

    On a CPU in blocks, elsewhere by the fused kernels, which other precisions take here.
    """
    network, (row, texts) = made(shape), one_row()
    if kernels == "fused":
        network = network.double()
    table = network.get_input_embeddings()
    weights = torch.randn(
        1, row["ids"].shape[1], 32, dtype=next(network.parameters()).dtype, generator=torch.Generator().manual_seed(2)
    )
    states = network.decoder(table(row["ids"]), row["positions"], segments=row["segments"], branches=row["branches"])
    (states * weights).sum().backward()
    together = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    seen: set[tuple[int, int]] = set()
    for ids, parts in texts:
        alone = network.decoder(table(ids[None]), torch.arange(len(ids))[None])
        there = torch.cat([states[:, a:b] for a, b in parts], 1)
        assert torch.allclose(alone, there, atol=1e-4)
        counted = torch.cat(
            [weights[:, a:b] * (0.0 if (a, b) in seen else 1.0) for a, b in parts], 1
        )  # what is shared counts once
        seen.add(parts[0])
        (alone * counted).sum().backward()
    for name, p in network.named_parameters():
        if p.grad is not None:
            assert float((p.grad - together[name]).norm() / p.grad.norm().clamp(min=1e-2)) < 1e-4, (
                name
            )  # a bias of keys has no gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("plain", [True, False])
def test_log_probabilities_are_those_of_the_logits(
    temperature: float, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, with gradients of states and head, and entropies."""
    monkeypatch.setattr(linear_loss, "MAX_LOGITS", 300 * 16)
    draw = torch.Generator().manual_seed(0)
    head: Any = torch.nn.Linear(16, 300, bias=not plain)
    states, tokens, pull = (
        torch.randn(50, 16, generator=draw, requires_grad=True),
        torch.randint(0, 300, (50,), generator=draw),
        torch.randn(50, generator=draw),
    )
    found = []
    for function in (
        lambda: linear_logprobs.linear_logprobs(states, head, tokens, temperature),
        lambda: linear_logprobs.logprobs_from_logits(head(states), tokens, temperature),
    ):
        states.grad = head.weight.grad = None
        chances, entropy = function()
        (chances * pull).sum().backward()
        found.append((chances.detach(), entropy, states.grad, head.weight.grad))
        assert not entropy.requires_grad
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5)
    logs = torch.log_softmax(head(states).detach() / temperature, -1)
    assert torch.allclose(found[0][1], torch.distributions.Categorical(logits=logs).entropy(), atol=1e-5)
    nothing, none = linear_logprobs.linear_logprobs(states[:0], head, tokens[:0])
    assert len(nothing) == len(none) == 0
