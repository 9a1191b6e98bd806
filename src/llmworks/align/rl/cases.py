"""Inputs and outputs of reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmworks.core.types import Message
from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class Case:
    """A completion to score: its dataset row, prompt, text, token count and whether it was truncated."""

    row: Row
    prompt: tuple[Message, ...]
    text: str
    tokens: int
    cut: bool


Values = Callable[[Sequence[Case]], list[float | str]]
