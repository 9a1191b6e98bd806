"""Divergence of a model's token probabilities from another's, sequence by sequence. Does not know models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Damage:
    """Sums over tokens: KL divergence from the original model, top-1 agreement, and both losses."""

    def __init__(self) -> None:
        self.kl = self.same = self.before = self.after = 0.0
        self.tokens = self.guesses = 0

    def add(self, old: Tensor, new: Tensor, told: Tensor) -> None:
        """Add logits [tokens, vocabulary] of both models, and the next tokens; the last position may lack one."""
        old, new = F.log_softmax(old.float(), -1), F.log_softmax(new.float(), -1)
        self.same += float((old.argmax(-1) == new.argmax(-1)).sum())
        self.before -= float(old[: len(told)].gather(-1, told[:, None]).sum())
        self.after -= float(new[: len(told)].gather(-1, told[:, None]).sum())
        self.kl += float((old - new).mul_(old.exp_()).sum())
        self.tokens, self.guesses = self.tokens + len(told), self.guesses + len(old)

    def figures(self) -> dict[str, float]:
        """Return KL divergence in nats per token, top-1 agreement and perplexities; {} without tokens."""
        if not self.tokens:
            return {}
        before, after = (float(torch.tensor(loss / self.tokens).exp()) for loss in (self.before, self.after))
        return {
            "kl": self.kl / self.guesses,
            "top1_agreement": self.same / self.guesses,
            "perplexity_before": before,
            "perplexity": after,
            "eval_tokens": self.tokens,
        }
