"""Reward model losses: Bradley-Terry for pairs, binary cross-entropy for steps."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, center: float = 0.0) -> Tensor:
    """Return -log of the probability that the chosen completion wins, its score less the margin [pairs].

    Bradley & Terry 1952; margin: Touvron et al. 2023 (arXiv:2307.09288, equation 2). `center`: weight of the squared
    sum of both scores, which keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def step_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each step's label (Lightman et al. 2023, arXiv:2305.20050), each [steps]."""
    return F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none")
