"""Inputs and outputs of pair losses: log-probabilities of chosen and rejected completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class PairLogprobs:
    """Summed log-probabilities in nats and token counts of the completions of pairs; each [pairs].

    The reference's are None without a reference.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy to reference of the chosen and the rejected completions, in nats."""
        assert self.ref_chosen is not None
        assert self.ref_rejected is not None
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def mean_logprobs(self) -> tuple[Tensor, Tensor]:
        """Mean log-probabilities per token of the chosen and the rejected completions."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class PairLoss(NamedTuple):
    """The loss and the implicit rewards of each pair; each [pairs]."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
