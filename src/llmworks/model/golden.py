"""Record and replay golden tokens of a Hugging Face model, with logits from torch.

Their content and tolerances are defined in `tokenize/chat/golden.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Golden
from llmworks.tokenize.chat import golden


def torch_logits(model: Any) -> golden.Logits:
    """Return a function that computes a causal model's logits as numpy [len(ids), vocab_size]."""

    def logits(ids: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()

    return logits


def record(path: Path) -> Golden:
    """Record the golden tokens of a Hugging Face model directory."""
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(path)
    return golden.record(tokenizer, stop_ids(path, tokenizer), torch_logits(load_model(path)))


def require(recorded: Golden, path: Path, *, mean_within: float, step: str) -> golden.LogitGap | None:
    """Replay golden tokens on a Hugging Face directory. Errors: GoldenMismatch when they differ."""
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(path)
    return golden.require(
        recorded,
        tokenizer,
        stop_ids(path, tokenizer),
        torch_logits(load_model(path)),
        mean_within=mean_within,
        step=step,
    )
