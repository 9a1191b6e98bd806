"""Fused linear log-probabilities: the head and the log-probability of given tokens, in chunks of tokens.

For losses that weight sequences by their probability (DPO, PPO, GRPO ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmworks.model.loss.linear_cross_entropy import get_chunk_size, is_plain_linear


class _LinearLogProbs(torch.autograd.Function):
    """Log-probabilities that save their gradient by the state, scaled in the backward pass.

    The gradient of the head's weight is recomputed, where it is trained.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities [n] and entropies [n].

        states: [n, hidden_size]; weight: [vocab_size, hidden_size]; tokens: [n].
        """
        grad_states = torch.empty_like(states) if states.requires_grad else None
        matrix = weight.to(states.dtype)
        logprobs, entropy = (states.new_empty(len(states), dtype=torch.float32) for _ in range(2))
        for part, logits in _iter_logit_chunks(states, matrix, scale):
            token_ids = tokens[part, None]
            total = logits.logsumexp(-1)
            token_logits = logits.gather(-1, token_ids)
            logprobs[part] = token_logits[:, 0] - total
            probabilities = torch.softmax(logits, -1)
            entropy[part] = total - torch.linalg.vecdot(probabilities, logits)
            if grad_states is not None:
                grad_logits = (
                    probabilities.neg_().scatter_add_(-1, token_ids, torch.ones_like(token_logits)).to(states.dtype)
                )
                torch.mm(grad_logits, matrix, out=grad_states[part])
        context.scale = scale
        context.save_for_backward(
            grad_states, states if weight.requires_grad else None, weight if weight.requires_grad else None, tokens
        )
        context.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Compute gradients: (one-hot token minus softmax) times the gradient of the log-probability."""
        grad_states, states, weight, tokens = context.saved_tensors
        gradient, scale = gradients[0], context.scale
        grad_weight = None
        if weight is not None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            for part, logits in _iter_logit_chunks(states, weight.to(states.dtype), scale):
                grad_logits = (
                    torch.softmax(logits, -1, out=logits)
                    .neg_()
                    .scatter_add_(-1, tokens[part, None], torch.ones_like(logits[:, :1]))
                )
                grad_weight.addmm_(
                    (grad_logits * gradient[part, None]).to(states.dtype).T.float(), states[part].float(), alpha=scale
                )
            grad_weight = grad_weight.to(weight.dtype)
        return (
            None if grad_states is None else grad_states * (gradient * scale)[:, None].to(grad_states.dtype),
            grad_weight,
            None,
            None,
        )


def _iter_logit_chunks(states: Tensor, matrix: Tensor, scale: float) -> Any:
    """Yield (slice, its logits [chunk, vocab_size] in fp32), all in one buffer, since allocating memory costs more than
    the computation.
    """
    step = get_chunk_size(len(matrix))
    buffer = states.new_empty(min(step, len(states)), len(matrix))
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        here = states[part]
        yield part, torch.mm(here, matrix.T, out=buffer[: len(here)]).float().mul_(scale)


def linear_logprobs(states: Tensor, head: nn.Module, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute (log-probabilities in nats of tokens [n] after states [n, hidden_size], entropies [n] without gradient).

    Logits are divided by `temperature`. Not differentiable twice.
    """
    if not len(states):
        return states.sum(-1).float(), states.new_zeros(0, dtype=torch.float32)
    if is_plain_linear(head):
        weight: Any = head.weight
        apply: Any = _LinearLogProbs.apply
        outputs: tuple[Tensor, Tensor] = apply(states, weight, tokens, 1 / temperature)
        return outputs
    step = get_chunk_size(int(getattr(head, "out_features", 1 << 16)))
    parts = [slice(start, start + step) for start in range(0, len(states), step)]
    chunk_outputs = [
        checkpoint(_compute_from_head, states[part], head, tokens[part], temperature, use_reentrant=False)
        for part in parts
    ]
    return torch.cat([logprobs for logprobs, _ in chunk_outputs]), torch.cat(
        [entropy for _, entropy in chunk_outputs]
    ).detach()


def _compute_from_head(states: Tensor, head: nn.Module, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return logprobs_from_logits(head(states), tokens, temperature)


def logprobs_from_logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute (log-probabilities, entropies) of tokens [n] from existing logits [n, vocab_size]."""
    logs = F.log_softmax(logits.float() / temperature, -1)
    return logs.gather(-1, tokens[:, None])[:, 0], -(logs.detach().exp() * logs.detach()).sum(-1)
