"""How far a student's chances are from a teacher's: pure functions on logits, and the loss of a batch, some tokens at a
time.

Sources: Hinton et al. 2015 (arXiv:1503.02531): temperature, and gradients times its square; Gu et al. 2023, MiniLLM
(arXiv:2306.08543): the reverse direction; Agarwal et al. 2023, GKD (arXiv:2306.13649): what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmworks.model.loss.linear_cross_entropy import chunk
from llmworks.train.finetune.examples import Batch
from llmworks.train.loop.losses import states_of
from llmworks.train.loop.packed import PackedBatch

DIRECTIONS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Of each row of logits [rows, vocabulary], in nats: KL(teacher || student) for beta 0, KL(student || teacher) for
    1, between them the generalised Jensen-Shannon divergence: beta KL(teacher || m) + (1 - beta) KL(student || m), m =
    beta teacher + (1 - beta) student. -> [rows]
    """
    s, t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    if beta in (0.0, 1.0):
        of, to = (t, s) if beta == 0.0 else (s, t)
        return (of.exp() * (of - to)).sum(-1)
    middle = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), 0)
    return beta * (t.exp() * (t - middle)).sum(-1) + (1 - beta) * (s.exp() * (s - middle)).sum(-1)


def taught(teacher: Any, *, beta: float, temperature: float, mix: float) -> Callable[[Any, Any], Tensor]:
    """The loss of a batch under a teacher of the same vocabulary: (1 - mix) T^2 divergence + mix cross-entropy, summed
    over the labels.

    Logits exist for some labels at once.
    """

    def loss(student: Any, batch: Batch | PackedBatch) -> Tensor:
        with torch.no_grad():
            right, guide, guide_head = states_of(teacher, batch)
        labels, states, head = states_of(student, batch)
        assert torch.equal(labels, right)
        total = states.new_zeros((), dtype=torch.float32)
        step = chunk(student.config.vocab_size)
        for first in range(0, len(states), step):
            part = slice(first, first + step)
            total = total + checkpoint(
                _part,
                states[part],
                guide[part],
                labels[part],
                head,
                guide_head,
                beta,
                temperature,
                mix,
                use_reentrant=False,
            )
        return total

    return loss


def _part(
    states: Tensor,
    guide: Tensor,
    labels: Tensor,
    head: Any,
    guide_head: Any,
    beta: float,
    temperature: float,
    mix: float,
) -> Tensor:
    logits = head(states).float()
    with torch.no_grad():
        wanted = guide_head(guide).float()
    total = (1 - mix) * temperature**2 * divergence(logits, wanted, beta, temperature).sum()
    return total + mix * F.cross_entropy(logits, labels, reduction="sum") if mix else total
