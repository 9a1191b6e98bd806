"""Compute router rows: hidden states of prompts, layer by layer. One block of the model is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.merge.moe.config import Expert, ExpertsConfig
from llmworks.model.io.layer_reader import LayerReader
from llmworks.tokenize.load import load_tokenizer

PromptStates = dict[str, Tensor]  # by prompt: [layers, hidden size]


def compute_router_rows(
    config: ExpertsConfig, base: Path, experts: Sequence[Expert], seed: int, layers: int, hidden_size: int
) -> Tensor:
    """Return router rows [layers, experts, hidden size], of norm 1 if they come from prompts. ModelError for a base
    without a tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.gate_mode == "random":
        return torch.randn(layers, len(experts), hidden_size, generator=generator)
    if config.gate_mode == "uniform_random":
        uniform: Tensor = torch.rand(layers, len(experts), hidden_size, generator=generator)
        return uniform.mul_(2).sub_(1).mul_(hidden_size**-0.5)
    tokenizer = load_tokenizer(base)
    prompts = list(
        dict.fromkeys(prompt for one in experts for prompt in [*one.positive_prompts, *one.negative_prompts])
    )
    ids = [
        list(tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False)["input_ids"])
        for prompt in prompts
    ]
    empty = next((prompt for prompt, tokens in zip(prompts, ids, strict=True) if not tokens), None)
    if empty is not None:
        raise ModelError(f"the prompt {empty!r} has no tokens")
    states = (
        embed_prompts(base, prompts, ids, layers)
        if config.gate_mode == "cheap_embed"
        else get_hidden_states(base, prompts, ids, mean=config.gate_mode == "hidden_avg")
    )
    rows = []
    for one in experts:
        row = get_mean_state(states, one.positive_prompts, config) - (
            get_mean_state(states, one.negative_prompts, config) if one.negative_prompts else 0
        )
        rows.append(row / row.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(rows, dim=1)


def get_mean_state(states: PromptStates, prompts: Sequence[str], config: ExpertsConfig) -> Tensor:
    """Return the mean state of prompts [layers, hidden size]; of embeddings the sum, normalized."""
    total: Tensor = torch.stack([states[prompt] for prompt in prompts]).sum(0)
    return (
        total / total.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        if config.gate_mode == "cheap_embed"
        else total / len(prompts)
    )


def embed_prompts(base: Path, prompts: Sequence[str], ids: Sequence[Sequence[int]], layers: int) -> PromptStates:
    """Return the sum of token embeddings of each prompt, the same for all layers."""
    embedding: Any = LayerReader(base).load_without_blocks().decoder.embedding
    return {
        prompt: embedding(torch.tensor(list(tokens))).detach().float().sum(0).expand(layers, -1)
        for prompt, tokens in zip(prompts, ids, strict=True)
    }


def get_hidden_states(base: Path, prompts: Sequence[str], ids: Sequence[Sequence[int]], *, mean: bool) -> PromptStates:
    """Return the input of each layer for each prompt: of the last token, or averaged over tokens."""
    source = LayerReader(base)
    collected: list[list[Tensor]] = [[] for _ in prompts]
    with torch.inference_mode():
        frame = source.load_without_blocks()
        stack: Any = frame.decoder
        places = [torch.arange(len(tokens))[None] for tokens in ids]
        states = [
            stack.add_positions(stack.embedding(torch.tensor([list(tokens)])), where)
            for tokens, where in zip(ids, places, strict=True)
        ]
        for number in range(source.shape.num_hidden_layers):
            for kept, state in zip(collected, states, strict=True):
                kept.append(state[0].mean(0) if mean else state[0, -1])
            with source.mount_block(stack, source.load_block(number)):
                states = [stack.run_blocks(state, where) for state, where in zip(states, places, strict=True)]
    return {prompt: torch.stack(kept).float() for prompt, kept in zip(prompts, collected, strict=True)}


def find_similar_layers(rows: Tensor) -> list[int]:
    """Return the layers whose rows [layers, experts, hidden size] are so similar that the router can hardly choose:
    their condition number is above 5, as mergekit-moe warns.
    """
    return [layer for layer, row in enumerate(rows) if float(torch.linalg.cond(row.float())) > 5]
