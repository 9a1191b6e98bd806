"""Losses of models that score: answers of a pair against one another, or steps of an answer each by itself.

Knows no model.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, center: float = 0.0) -> Tensor:
    """-log of the chance that the chosen answer wins, its score less the margin (Bradley & Terry 1952; margin: Touvron
    et al. 2023, arXiv:2307.09288, equation 2); each [pairs].

    `center`: weight of the square of both scores' sum, which keeps scores around 0 (Eisenstein et al. 2023,
    arXiv:2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def right_steps(scores: Tensor, right: Tensor) -> Tensor:
    """-log of the chance of each step's label (Lightman et al. 2023, arXiv:2305.20050). scores, right: [steps]."""
    return F.binary_cross_entropy_with_logits(scores, right.float(), reduction="none")
