"""Inputs and outputs of reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmworks.core.types import Message
from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class RewardInput:
    """A completion to score: its dataset row, prompt, text, token count and whether it was truncated."""

    row: Row
    prompt: tuple[Message, ...]
    text: str
    num_tokens: int
    truncated: bool


RewardFunction = Callable[[Sequence[RewardInput]], list[float | str]]
