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

from llmworks.model.loss.linear_cross_entropy import chunk, is_plain


class _LinearLogProbs(torch.autograd.Function):
    """Log-probabilities that save their gradient by the state, scaled in the backward pass.

    The gradient of the head's weight is recomputed, where it is trained.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities [n] and entropies [n].

        states: [n, hidden_size]; weight: [vocab_size, hidden_size]; tokens: [n].
        """
        by_state = torch.empty_like(states) if states.requires_grad else None
        matrix = weight.to(states.dtype)
        found, entropy = (states.new_empty(len(states), dtype=torch.float32) for _ in range(2))
        for part, logits in _chunks(states, matrix, scale):
            wanted = tokens[part, None]
            total = logits.logsumexp(-1)
            right = logits.gather(-1, wanted)
            found[part] = right[:, 0] - total
            chances = torch.softmax(logits, -1)
            entropy[part] = total - torch.linalg.vecdot(chances, logits)
            if by_state is not None:
                by_logits = chances.neg_().scatter_add_(-1, wanted, torch.ones_like(right)).to(states.dtype)
                torch.mm(by_logits, matrix, out=by_state[part])
        context.scale = scale
        context.save_for_backward(
            by_state, states if weight.requires_grad else None, weight if weight.requires_grad else None, tokens
        )
        context.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Compute gradients: (one-hot token minus softmax) times the gradient of the log-probability."""
        by_state, states, weight, tokens = context.saved_tensors
        gradient, scale = gradients[0], context.scale
        by_weight = None
        if weight is not None:
            by_weight = torch.zeros_like(weight, dtype=torch.float32)
            for part, logits in _chunks(states, weight.to(states.dtype), scale):
                by_logits = (
                    torch.softmax(logits, -1, out=logits)
                    .neg_()
                    .scatter_add_(-1, tokens[part, None], torch.ones_like(logits[:, :1]))
                )
                by_weight.addmm_(
                    (by_logits * gradient[part, None]).to(states.dtype).T.float(), states[part].float(), alpha=scale
                )
            by_weight = by_weight.to(weight.dtype)
        return (
            None if by_state is None else by_state * (gradient * scale)[:, None].to(by_state.dtype),
            by_weight,
            None,
            None,
        )


def _chunks(states: Tensor, matrix: Tensor, scale: float) -> Any:
    """Yield (slice, its logits [chunk, vocab_size] in fp32), all in one buffer, since allocating memory costs more than
    the computation.
    """
    step = chunk(len(matrix))
    room = states.new_empty(min(step, len(states)), len(matrix))
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        here = states[part]
        yield part, torch.mm(here, matrix.T, out=room[: len(here)]).float().mul_(scale)


def linear_logprobs(states: Tensor, head: nn.Module, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute (log-probabilities in nats of tokens [n] after states [n, hidden_size], entropies [n] without gradient).

    Logits are divided by `temperature`. Not differentiable twice.
    """
    if not len(states):
        return states.sum(-1).float(), states.new_zeros(0, dtype=torch.float32)
    if is_plain(head):
        weight: Any = head.weight
        apply: Any = _LinearLogProbs.apply
        found: tuple[Tensor, Tensor] = apply(states, weight, tokens, 1 / temperature)
        return found
    step = chunk(int(getattr(head, "out_features", 1 << 16)))
    parts = [slice(start, start + step) for start in range(0, len(states), step)]
    made = [checkpoint(_of_head, states[part], head, tokens[part], temperature, use_reentrant=False) for part in parts]
    return torch.cat([logprobs for logprobs, _ in made]), torch.cat([entropy for _, entropy in made]).detach()


def _of_head(states: Tensor, head: nn.Module, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return of_logits(head(states), tokens, temperature)


def of_logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute (log-probabilities, entropies) of tokens [n] from existing logits [n, vocab_size]."""
    logs = F.log_softmax(logits.float() / temperature, -1)
    return logs.gather(-1, tokens[:, None])[:, 0], -(logs.detach().exp() * logs.detach()).sum(-1)
