"""A reward model as a judge: a model with one number at its end says how good an answer is.

Knows no prompt of a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmworks.core.artifact import Model
from llmworks.core.errors import ModelError
from llmworks.core.types import Message
from llmworks.tokenize.chat.templates import encode, render_text
from llmworks.tokenize.load import load_tokenizer, quiet_transformers, read_json


def is_reward(model: Model) -> bool:
    """Whether a model's directory holds a sequence classifier."""
    config = model.path / "config.json"
    return (
        model.format not in ("http", "gguf")
        and config.exists()
        and any(str(a).endswith("ForSequenceClassification") for a in read_json(config).get("architectures") or [])
    )


class Reward:
    """A loaded reward model."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        quiet_transformers()
        self.model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        if self.model.config.num_labels != 1:
            raise ModelError(f"{path}: has {self.model.config.num_labels} outputs; a reward model has one")
        self.tokenizer = load_tokenizer(path)

    def of(self, prompt: Sequence[Message], answer: str) -> float:
        """How good an answer to a conversation is; larger is better, there is no scale."""
        import torch

        ids = encode(
            self.tokenizer,
            render_text(self.tokenizer, (*prompt, Message("assistant", answer)), generation_prompt=False),
        )
        with torch.inference_mode():
            return float(self.model(torch.tensor([list(ids)])).logits[0, 0])
