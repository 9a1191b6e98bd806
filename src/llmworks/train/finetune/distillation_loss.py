"""Knowledge distillation losses: divergences between student and teacher logits, computed in chunks.

Sources: Hinton et al. 2015 (arXiv:1503.02531): temperature, and scaling the loss by its square; Gu et al. 2023, MiniLLM
(arXiv:2306.08543): reverse KL; Agarwal et al. 2023, GKD (arXiv:2306.13649): generalized Jensen-Shannon divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmworks.model.loss.linear_cross_entropy import get_chunk_size
from llmworks.train.finetune.examples import PaddedBatch
from llmworks.train.loop.losses import get_label_states
from llmworks.train.loop.packed_steps import PackedBatch

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Compute the generalized Jensen-Shannon divergence of each row of logits [rows, vocabulary], in nats -> [rows].

    beta 0: forward KL(teacher || student); beta 1: reverse KL(student || teacher); between: beta KL(teacher || m) + (1
    - beta) KL(student || m) with m = beta teacher + (1 - beta) student.
    """
    s, t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    if beta in (0.0, 1.0):
        of, to = (t, s) if beta == 0.0 else (s, t)
        return (of.exp() * (of - to)).sum(-1)
    middle = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), 0)
    return beta * (t.exp() * (t - middle)).sum(-1) + (1 - beta) * (s.exp() * (s - middle)).sum(-1)


def create_distillation_loss(
    teacher: Any, *, beta: float, temperature: float, ce_weight: float
) -> Callable[[Any, Any], Tensor]:
    """Return the distillation loss of a batch for a teacher with the same vocabulary, summed over the labels.

    (1 - ce_weight) T^2 divergence + ce_weight cross-entropy. Logits are materialized in chunks.
    """

    def loss(student: Any, batch: PaddedBatch | PackedBatch) -> Tensor:
        with torch.no_grad():
            right, guide, guide_head = get_label_states(teacher, batch)
        labels, states, head = get_label_states(student, batch)
        assert torch.equal(labels, right)
        total = states.new_zeros((), dtype=torch.float32)
        step = get_chunk_size(student.config.vocab_size)
        for first in range(0, len(states), step):
            part = slice(first, first + step)
            total = total + checkpoint(
                _chunk_loss,
                states[part],
                guide[part],
                labels[part],
                head,
                guide_head,
                beta,
                temperature,
                ce_weight,
                use_reentrant=False,
            )
        return total

    return loss


def _chunk_loss(
    states: Tensor,
    teacher_states: Tensor,
    labels: Tensor,
    head: Any,
    teacher_head: Any,
    beta: float,
    temperature: float,
    ce_weight: float,
) -> Tensor:
    logits = head(states).float()
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_states).float()
    total = (1 - ce_weight) * temperature**2 * divergence(logits, teacher_logits, beta, temperature).sum()
    return total + ce_weight * F.cross_entropy(logits, labels, reduction="sum") if ce_weight else total
