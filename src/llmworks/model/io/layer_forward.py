"""Compute a model's logits layer by layer from its directory, without the whole model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmworks.model.io.layer_reader import Source


def logits_of(source: Source, texts: Sequence[Sequence[int]]) -> list[Any]:
    """Compute the logits of each sequence, numpy [length, vocab_size], fp32."""
    with torch.inference_mode():
        frame = source.frame()
        stack: Any = frame.decoder
        places = [torch.arange(len(ids))[None] for ids in texts]
        states = [
            stack.begin(stack.embedding(torch.tensor([list(ids)])), at) for ids, at in zip(texts, places, strict=True)
        ]
        for number in range(source.shape.num_hidden_layers):
            with source.only(stack, source.block(number)):
                states = [stack.through(state, at) for state, at in zip(states, places, strict=True)]
        return [frame.head(stack.norm(state))[0].float().numpy() for state in states]
