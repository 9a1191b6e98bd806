"""The head and its cross-entropy in one, a few tokens at a time: the logits of a text never exist all at once.

Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # a label that counts for nothing
LOGITS, MOST = 1 << 25, 512  # numbers, and tokens, whose logits exist at once


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed beside the loss, so that no logits are kept for later and none are computed twice (as
    Liger's fused kernel does).
    """

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """states: [tokens, width]; weight: [vocabulary, width]; labels: [tokens]."""
        by_state = torch.empty_like(states) if states.requires_grad else None
        matrix = weight.to(states.dtype)
        by_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        )  # a sum of many chunks
        total = states.new_zeros((), dtype=torch.float32)
        step = chunk(len(weight))
        room = states.new_empty(
            min(step, len(states)), len(weight)
        )  # one for all: memory that is fresh costs more than the mathematics
        for start in range(0, len(states), step):
            here, wanted = states[start : start + step], labels[start : start + step, None]
            logits = torch.mm(here, matrix.T, out=room[: len(here)]).float()
            largest, right = logits.amax(-1, keepdim=True), logits.gather(-1, wanted)
            chances = torch.softmax(logits, -1, out=logits)
            total += (
                largest - chances.amax(-1, keepdim=True).log() - right
            ).sum()  # the largest chance is 1 / sum of exp(logit - largest)
            if by_state is None and by_weight is None:
                continue
            by_logits = chances.scatter_add_(-1, wanted, torch.full_like(right, -1.0)).to(
                states.dtype
            )  # softmax less one where the label is
            if by_state is not None:
                torch.mm(by_logits, matrix, out=by_state[start : start + step])
            if by_weight is not None:
                (
                    by_weight.addmm_(by_logits.T, here, alpha=scale)
                    if by_logits.dtype == torch.float32
                    else by_weight.add_(by_logits.T @ here, alpha=scale)
                )
        context.scale = scale
        context.save_for_backward(by_state, None if by_weight is None else by_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients that were computed, times that of the loss: with it a scaler of fp16 lifts those of the states
        before they are small.
        """
        by_state, by_weight = context.saved_tensors
        gradient = float(gradients[0])
        return (
            None if by_state is None else by_state * (gradient * context.scale),
            by_weight if by_weight is None or gradient == 1.0 else by_weight * gradient,
            None,
            None,
        )


def chunk(vocabulary: int) -> int:
    """Tokens whose logits exist at once."""
    return max(1, min(MOST, LOGITS // vocabulary))


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Summed cross-entropy in nats of labels [tokens] under the logits states [tokens, width] @ weight.T [width,
    vocabulary], times `scale`.

    Not differentiable twice.
    """
    summed: Tensor = _LinearCrossEntropy.apply(states, weight, labels, scale)  # type: ignore[no-untyped-call]
    return summed


def mean_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the labels [batch, length] that count (-100: not) under the states [batch, length,
    width] at their places.
    """
    at = labels != IGNORED
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    return linear_cross_entropy(states[at], weight, labels[at], 1 / max(1, int(at.sum())))


def is_plain(head: Any) -> bool:
    """Whether a head is its matrix and nothing else: no bias, no adapter around it, no hook on it."""
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def head_loss(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """`mean_cross_entropy` under any head [width] -> [vocabulary]; one that is more than a matrix computes its logits
    of all labels at once.
    """
    if is_plain(head):
        weight: Any = head.weight
        return mean_cross_entropy(states, weight, labels)
    at = labels != IGNORED
    return F.cross_entropy(head(states[at]).float(), labels[at], reduction="sum") / max(1, int(at.sum()))
