"""Rollouts: prompts, completions with their rewards, and per-token values. Saved and loaded as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmworks.core.errors import TrainingError
from llmworks.core.progress import write_atomic
from llmworks.core.types import Message
from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt: its dataset row, messages and token ids."""

    row: Row
    prompt: tuple[Message, ...]
    ids: tuple[int, ...]

    @property
    def labels(self) -> int:
        """Always 1: a prompt counts as one example."""
        return 1


@dataclass
class SampledCompletion:
    """A sampled completion: its ids (with the end token, if it ended), reward and per-token values.

    `engine`, `old`, `reference`: log-probabilities of its tokens by the engine, by the trainer before any update, and
    by the reference.
    """

    ids: list[int]
    text: str
    truncated: bool
    reward: float
    rewards_by_function: dict[str, float]
    engine: list[float]
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


PER_TOKEN_FIELDS = ("old", "reference", "values", "advantages", "returns")  # per-token fields


@dataclass
class Rollout:
    """The completions of some prompts [prompts][completions]. `prompts`: their indices."""

    prompts: list[int]
    completions: list[list[SampledCompletion]]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """Rewards [prompts, completions]; NaN where a reward function failed."""
        return torch.tensor([[one.reward for one in group] for group in self.completions])

    def save(self, file: Path) -> None:
        """Save the rollout atomically."""
        write_atomic(
            file,
            json.dumps(
                {
                    "prompts": self.prompts,
                    "figures": self.metrics,
                    "drawn": [[asdict(one) for one in group] for group in self.completions],
                }
            ),
        )

    @classmethod
    def load(cls, file: Path) -> Rollout:
        """Load a rollout.

        Errors: TrainingError for an unreadable file.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                found["prompts"],
                [[SampledCompletion(**one) for one in group] for group in found["drawn"]],
                found["figures"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{file}: the completions of this step cannot be read ({error}); delete {file.parent.parent} to"
                " start over"
            ) from None
