"""Reward model as a judge: a sequence classifier with one output scores an answer.

Does not use judge prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmworks.core.artifact import Model
from llmworks.core.errors import ModelError
from llmworks.core.types import Message
from llmworks.tokenize.chat.templates import encode, render_text
from llmworks.tokenize.load import load_tokenizer, read_json, silence_transformers


def is_reward_model(model: Model) -> bool:
    """Return whether a model's directory holds a sequence classifier."""
    config = model.path / "config.json"
    return (
        model.format not in ("http", "gguf")
        and config.exists()
        and any(str(a).endswith("ForSequenceClassification") for a in read_json(config).get("architectures") or [])
    )


class RewardJudge:
    """A loaded reward model."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        silence_transformers()
        self.model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        if self.model.config.num_labels != 1:
            raise ModelError(f"{path}: has {self.model.config.num_labels} outputs, but a reward model must have one")
        self.tokenizer = load_tokenizer(path)

    def score(self, prompt: Sequence[Message], answer: str) -> float:
        """Compute the reward of an answer to a conversation; larger is better, unbounded."""
        import torch

        ids = encode(
            self.tokenizer,
            render_text(self.tokenizer, (*prompt, Message("assistant", answer)), generation_prompt=False),
        )
        with torch.inference_mode():
            return float(self.model(torch.tensor([list(ids)])).logits[0, 0])
