"""Golden tokens of a Hugging Face model: record them, or replay them, with logits from torch.

What they hold, and what must replay, is `tokenize/chat/golden.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Golden
from llmworks.tokenize.chat import golden


def torch_logits(model: Any) -> golden.Logits:
    """Logits of a loaded causal model, as numpy [len(ids), vocabulary]."""

    def logits(ids: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()

    return logits


def record(path: Path) -> Golden:
    """The golden record of a Hugging Face directory."""
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(path)
    return golden.record(tokenizer, stop_ids(path, tokenizer), torch_logits(load_model(path)))


def require(recorded: Golden, path: Path, *, mean_within: float, step: str) -> golden.LogitGap | None:
    """Replay a record on a Hugging Face directory; GoldenMismatch when it does not hold."""
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
