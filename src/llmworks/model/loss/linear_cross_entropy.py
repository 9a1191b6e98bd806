"""Fused linear cross-entropy: the head and its loss in chunks of tokens, so that the full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100  # label that is not trained on
MAX_LOGITS, MAX_CHUNK_TOKENS = 1 << 25, 512  # maximum elements, and tokens, of a chunk of logits


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy with gradients computed in the forward pass: logits are not stored or recomputed (as Liger)."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Compute from states: [tokens, hidden_size]; weight: [vocab_size, hidden_size]; labels: [tokens]."""
        grad_states = torch.empty_like(states) if states.requires_grad else None
        matrix = weight.to(states.dtype)
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        )  # fp32, as it is a sum over many chunks
        total = states.new_zeros((), dtype=torch.float32)
        step = get_chunk_size(len(weight))
        buffer = states.new_empty(
            min(step, len(states)), len(weight)
        )  # one buffer for all chunks: allocating memory costs more than the computation
        for start in range(0, len(states), step):
            here, label_ids = states[start : start + step], labels[start : start + step, None]
            logits = torch.mm(here, matrix.T, out=buffer[: len(here)]).float()
            largest, label_logits = logits.amax(-1, keepdim=True), logits.gather(-1, label_ids)
            probabilities = torch.softmax(logits, -1, out=logits)
            total += (
                largest - probabilities.amax(-1, keepdim=True).log() - label_logits
            ).sum()  # the largest probability is 1 / sum of exp(logit - largest)
            if grad_states is None and grad_weight is None:
                continue
            grad_logits = probabilities.scatter_add_(-1, label_ids, torch.full_like(label_logits, -1.0)).to(
                states.dtype
            )  # softmax minus one-hot label
            if grad_states is not None:
                torch.mm(grad_logits, matrix, out=grad_states[start : start + step])
            if grad_weight is not None:
                (
                    grad_weight.addmm_(grad_logits.T, here, alpha=scale)
                    if grad_logits.dtype == torch.float32
                    else grad_weight.add_(grad_logits.T @ here, alpha=scale)
                )
        context.scale = scale
        context.save_for_backward(grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale the stored gradients by that of the loss.

        The scale of an fp16 gradient scaler is applied to the state gradients here, before they are small.
        """
        grad_states, grad_weight = context.saved_tensors
        gradient = float(gradients[0])
        return (
            None if grad_states is None else grad_states * (gradient * context.scale),
            grad_weight if grad_weight is None or gradient == 1.0 else grad_weight * gradient,
            None,
            None,
        )


def get_chunk_size(vocabulary: int) -> int:
    """Return the number of tokens per chunk of logits."""
    return max(1, min(MAX_CHUNK_TOKENS, MAX_LOGITS // vocabulary))


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the summed cross-entropy in nats of labels [tokens], times `scale`.

    Logits are states [tokens, hidden_size] @ weight.T; weight: [vocab_size, hidden_size]. Not differentiable twice.
    """
    summed: Tensor = _LinearCrossEntropy.apply(states, weight, labels, scale)  # type: ignore[no-untyped-call]
    return summed


def mean_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy in nats of labels [batch, length] (-100 = ignored) under the states at their
    positions [batch, length, hidden_size].
    """
    at = labels != IGNORE_INDEX
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    return linear_cross_entropy(states[at], weight, labels[at], 1 / max(1, int(at.sum())))


def is_plain_linear(head: Any) -> bool:
    """Return whether a head is a bare matrix: no bias, adapter or hooks."""
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def head_loss(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Compute `mean_cross_entropy` under any head; not a bare matrix: all labels' logits at once."""
    if is_plain_linear(head):
        weight: Any = head.weight
        return mean_cross_entropy(states, weight, labels)
    at = labels != IGNORE_INDEX
    return F.cross_entropy(head(states[at]).float(), labels[at], reduction="sum") / max(1, int(at.sum()))
