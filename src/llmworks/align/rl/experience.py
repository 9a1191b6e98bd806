"""What a policy drew: prompts, answers with their rewards, and what is known of each token. Saved and loaded as
safetensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmworks.core.errors import TrainingError
from llmworks.core.progress import write_whole
from llmworks.core.types import Message
from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class Asked:
    """A prompt: the row that it is of, its messages, its token ids."""

    row: Row
    prompt: tuple[Message, ...]
    ids: tuple[int, ...]

    @property
    def labels(self) -> int:
        """One prompt."""
        return 1


@dataclass
class Drawn:
    """An answer that was drawn: its ids (the end token among them, if it ended), what it is worth, log-probabilities of
    its tokens as the engine, the trainer before any step, and the reference have them.
    """

    ids: list[int]
    text: str
    cut: bool
    reward: float
    parts: dict[str, float]
    engine: list[float]
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


TOKENS = ("old", "reference", "values", "advantages", "returns")  # what is known of each token


@dataclass
class Rollout:
    """The answers to some prompts [prompts][answers]; `prompts`: their numbers."""

    prompts: list[int]
    drawn: list[list[Drawn]]
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """[prompts, answers]; NaN where nobody knows."""
        return torch.tensor([[one.reward for one in group] for group in self.drawn])

    def save(self, file: Path) -> None:
        """Write it whole."""
        write_whole(
            file,
            json.dumps(
                {
                    "prompts": self.prompts,
                    "figures": self.figures,
                    "drawn": [[asdict(one) for one in group] for group in self.drawn],
                }
            ),
        )

    @classmethod
    def load(cls, file: Path) -> Rollout:
        """TrainingError for a file that cannot be read."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                found["prompts"], [[Drawn(**one) for one in group] for group in found["drawn"]], found["figures"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{file}: the answers of this step cannot be read ({error}); delete {file.parent.parent} to begin anew"
            ) from None
