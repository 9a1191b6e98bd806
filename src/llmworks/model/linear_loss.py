"""The head and its cross-entropy in one, a few tokens at a time: the logits of a text never exist all at once. Knows no model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed beside the loss, so that no logits are kept for later and none are computed twice (as Liger's fused kernel does)."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """states: [tokens, width]; weight: [vocabulary, width]; labels: [tokens]."""
        by_state = torch.empty_like(states) if states.requires_grad else None
        by_weight = torch.zeros_like(weight) if weight.requires_grad else None
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), CHUNK):
            here, wanted = states[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits = (here @ weight.T).float()
            largest = logits.amax(-1, keepdim=True)
            right = logits.gather(-1, wanted)
            chances = logits.sub_(largest).exp_()
            sums = chances.sum(-1, keepdim=True)
            total += (sums.log() + largest - right).sum()
            if by_state is None and by_weight is None:
                continue
            chances.div_(sums).scatter_add_(-1, wanted, torch.full_like(right, -1.0))  # softmax less one where the label is
            slope = chances.to(states.dtype)
            if by_state is not None:
                torch.mm(slope, weight, out=by_state[start : start + CHUNK])
            if by_weight is not None:
                by_weight.addmm_(slope.T, here)
        context.save_for_backward(by_state, by_weight)
        return total

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients that were computed, times that of the loss."""
        by_state, by_weight = context.saved_tensors
        (slope,) = slopes
        return None if by_state is None else by_state * slope.to(by_state.dtype), None if by_weight is None else by_weight * slope.to(by_weight.dtype), None


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats of labels [tokens] under the logits states [tokens, width] @ weight.T [width, vocabulary]. Not differentiable twice."""
    summed: Tensor = _LinearCrossEntropy.apply(states, weight, labels)  # type: ignore[no-untyped-call]
    return summed
