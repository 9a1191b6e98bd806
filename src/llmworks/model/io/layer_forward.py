"""Compute a model's logits layer by layer from its directory, without the whole model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmworks.model.io.layer_reader import LayerReader


def compute_logits(reader: LayerReader, sequences: Sequence[Sequence[int]]) -> list[Any]:
    """Compute the logits of each sequence, numpy [length, vocab_size], fp32."""
    with torch.inference_mode():
        model = reader.load_without_blocks()
        stack: Any = model.decoder
        positions = [torch.arange(len(ids))[None] for ids in sequences]
        states = [
            stack.add_positions(stack.embedding(torch.tensor([list(ids)])), at)
            for ids, at in zip(sequences, positions, strict=True)
        ]
        for number in range(reader.shape.num_hidden_layers):
            with reader.mount_block(stack, reader.load_block(number)):
                states = [stack.run_blocks(state, at) for state, at in zip(states, positions, strict=True)]
        return [model.head(stack.norm(state))[0].float().numpy() for state in states]
