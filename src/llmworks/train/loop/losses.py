"""Losses of next tokens as pure functions of a model and a batch, summed over its labels in nats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.model.loss.linear_cross_entropy import IGNORED, chunk, is_plain, linear_cross_entropy
from llmworks.train.finetune.examples import Batch
from llmworks.train.loop.packed import PackedBatch

SHAPED = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)  # a config that has one of these makes more of the head's product than its logits
Loss = Callable[[Any, Any], Tensor]


def next_token_loss(model: Any, batch: Batch) -> Tensor:
    """Summed cross-entropy of a padded batch's label tokens.

    The output head runs on label positions only, some at a time: for short answers to long prompts that saves most of
    its work, and the logits never exist all at once.
    """
    labels = batch.ids[batch.rows, batch.columns]
    if getattr(model, "head_on_labels", False):  # such models do so themselves
        label_ids = torch.full_like(batch.ids, IGNORED)
        label_ids[batch.rows, batch.columns] = labels
        mean: Tensor = model(input_ids=batch.ids, labels=label_ids).loss
        return mean * batch.labels
    if hasattr(model, "module") or whole_logits(model):  # the first: of several replicas
        return F.cross_entropy(_logits(model, batch).float(), labels, reduction="sum")
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, length, width]
    picked, head = (
        hidden[batch.rows, batch.columns - 1],
        model.get_output_embeddings(),
    )  # the position before predicts the label
    if is_plain(head):
        return linear_cross_entropy(picked, head.weight, labels)
    return F.cross_entropy(head(picked).float(), labels, reduction="sum")


def whole_logits(model: Any) -> bool:
    """Whether a model's logits are more than its states times its head: shaped after it, or with a soft prompt in
    front.
    """
    return hasattr(model, "peft_config") or any(
        getattr(model.config, name, None) not in (None, 0, 1) for name in SHAPED
    )


def _logits(model: Any, batch: Batch) -> Tensor:
    """The logits at the labels of a padded batch [labels, vocabulary]; those of a soft prompt, which stand before them,
    are left out.
    """
    found: Tensor = model(input_ids=batch.ids, use_cache=False).logits[:, -batch.ids.shape[1] :][
        batch.rows, batch.columns - 1
    ]
    return found


def label_logits(model: Any, batch: Batch | PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [labels, vocabulary], labels) of a batch, some at a time, for who looks at more than the loss.

    Of one process.
    """
    if not isinstance(batch, PackedBatch) and whole_logits(model):
        yield _logits(model, batch).float(), batch.ids[batch.rows, batch.columns]
        return
    labels, states, head = states_of(model, batch)
    size = chunk(model.config.vocab_size)
    for first in range(0, len(states), size):
        yield head(states[first : first + size]).float(), labels[first : first + size]


def states_of(model: Any, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor, Any]:
    """(labels [n], states before them [n, width], the head that makes logits of states), of a model of one process that
    is not `whole_logits`.
    """
    head = model.get_output_embeddings()
    if isinstance(batch, PackedBatch):
        at = batch.label_ids[:, 1:] != IGNORED
        states = model.decoder(model.get_input_embeddings()(batch.ids), batch.positions, segments=batch.segments)[
            :, :-1
        ][at]
        return batch.label_ids[:, 1:][at], states, head
    states = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns - 1]
    return batch.ids[batch.rows, batch.columns], states, head


class Noise:
    """NEFTune: uniform noise on embedded tokens while training, up to alpha / sqrt(tokens of the text * width) (Jain et
    al. 2023, arXiv:2310.05914).
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha, self.lengths = alpha, torch.ones(())
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, table: Any, _: Any, embedded: Tensor) -> Tensor:
        if not table.training:
            return embedded
        most = self.alpha / (self.lengths * embedded.shape[-1]).sqrt()  # [rows, length or 1]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[..., None].to(embedded)

    def around(self, loss: Loss) -> Loss:
        """The same loss; the lengths of its batch's texts are known to the noise."""

        def noisy(model: Any, batch: Any) -> Tensor:
            if isinstance(batch, PackedBatch):
                counts = batch.segments[0].bincount()
                self.lengths = counts[batch.segments].float()
            else:
                self.lengths = batch.lengths[:, None].to(batch.ids.device).float()
            return loss(model, batch)

        return noisy
