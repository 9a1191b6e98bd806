"""Divergence of a model's token probabilities from another's, sequence by sequence. Does not know models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Divergence:
    """Sums over tokens: KL divergence from the original model, top-1 agreement, and both losses."""

    def __init__(self) -> None:
        self.kl = self.agreements = self.original_loss = self.quantized_loss = 0.0
        self.tokens = self.positions = 0

    def add(self, old: Tensor, new: Tensor, next_tokens: Tensor) -> None:
        """Add logits [tokens, vocabulary] of both models, and the next tokens; the last position may lack one."""
        old, new = F.log_softmax(old.float(), -1), F.log_softmax(new.float(), -1)
        self.agreements += float((old.argmax(-1) == new.argmax(-1)).sum())
        self.original_loss -= float(old[: len(next_tokens)].gather(-1, next_tokens[:, None]).sum())
        self.quantized_loss -= float(new[: len(next_tokens)].gather(-1, next_tokens[:, None]).sum())
        self.kl += float((old - new).mul_(old.exp_()).sum())
        self.tokens, self.positions = self.tokens + len(next_tokens), self.positions + len(old)

    def compute_metrics(self) -> dict[str, float]:
        """Return KL divergence in nats per token, top-1 agreement and perplexities; {} without tokens."""
        if not self.tokens:
            return {}
        before, after = (
            float(torch.tensor(loss / self.tokens).exp()) for loss in (self.original_loss, self.quantized_loss)
        )
        return {
            "kl": self.kl / self.positions,
            "top1_agreement": self.agreements / self.positions,
            "original_perplexity": before,
            "perplexity": after,
            "eval_tokens": self.tokens,
        }
