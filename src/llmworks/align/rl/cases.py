"""What a reward function is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmworks.core.types import Message
from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class Case:
    """An answer to be valued: the row that was asked, its prompt, the answer's text, how many tokens it has, and
    whether it was cut off.
    """

    row: Row
    prompt: tuple[Message, ...]
    text: str
    tokens: int
    cut: bool


Values = Callable[[Sequence[Case]], list[float | str]]
