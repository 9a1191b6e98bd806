"""Record and replay golden tokens of a Hugging Face model, with logits from torch.

Their content and tolerances are defined in `tokenize/chat/golden.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Golden
from llmworks.core.errors import GoldenMismatch
from llmworks.tokenize.chat import golden

MAX_WEIGHT = 1e8


def make_logits_function(model: Any) -> golden.Logits:
    """Return a function that computes a causal model's logits as numpy [len(ids), vocab_size]."""

    def logits(ids: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()

    return logits


def find_broken_weights(model: Any) -> str:
    """Return the first parameter or buffer of a torch module with values that no training makes, and their number.

    These are NaN and infinite values, and parameters of `MAX_WEIGHT` and more, as a flipped exponent bit makes them.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and (count := int((~tensor.isfinite()).sum())):
            return f"{name} holds {count} values that are NaN or infinite"
    for name, tensor in model.named_parameters():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and (largest := float(tensor.detach().abs().max())) >= MAX_WEIGHT
        ):
            return f"{name} holds a value of {largest:.1g}, which no training makes"
    return ""


def record_golden(path: Path) -> Golden:
    """Record the golden tokens of a Hugging Face model directory."""
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(path)
    return golden.record_golden(tokenizer, get_stop_ids(path, tokenizer), make_logits_function(load_model(path)))


def require_golden(recorded: Golden, path: Path, *, mean_within: float, step: str) -> golden.LogitDifference | None:
    """Replay golden tokens on a Hugging Face directory. Errors: GoldenMismatch when they differ."""
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer

    tokenizer, model = load_tokenizer(path), load_model(path)
    if problem := find_broken_weights(model):
        raise GoldenMismatch(f"{step}: {problem}; nothing was published")
    return golden.require_replay(
        recorded,
        tokenizer,
        get_stop_ids(path, tokenizer),
        make_logits_function(model),
        mean_tolerance=mean_within,
        step=step,
    )
