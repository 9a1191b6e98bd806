"""What losses of pairs are computed from: how probable the two answers of each pair are, to the policy and to the
reference.

Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Sides:
    """Log-probabilities of whole answers in nats, summed over their tokens, and how many tokens they have; each
    [pairs].

    Without a reference those are None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """How much more probable than to the reference the chosen and the rejected answers are, in nats."""
        assert self.reference_chosen is not None
        assert self.reference_rejected is not None
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and the rejected answers, per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class Judged(NamedTuple):
    """A loss of each pair, and what the policy gives each side by it; each [pairs]."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor
