"""Next-token losses: functions of a model and a batch, summed over the label tokens, in nats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX, get_chunk_size, is_plain_linear, linear_cross_entropy
from llmworks.train.finetune.examples import PaddedBatch
from llmworks.train.loop.packed_steps import PackedBatch

LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)  # configs with one of these transform the output of the LM head
Loss = Callable[[Any, Any], Tensor]


def next_token_loss(model: Any, batch: PaddedBatch) -> Tensor:
    """Compute the summed cross-entropy of a padded batch's label tokens.

    The LM head runs on label positions only, in chunks. For short completions of long prompts this saves most of its
    work, and the full logits are never materialized.
    """
    labels = batch.ids[batch.rows, batch.columns]
    if getattr(model, "head_on_labels", False):  # such models apply the head to label positions themselves
        label_ids = torch.full_like(batch.ids, IGNORE_INDEX)
        label_ids[batch.rows, batch.columns] = labels
        mean: Tensor = model(input_ids=batch.ids, labels=label_ids).loss
        return mean * batch.labels
    if hasattr(model, "module") or needs_full_logits(model):  # `module`: wrapped in DDP
        return F.cross_entropy(_compute_label_logits(model, batch).float(), labels, reduction="sum")
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, length, hidden size]
    picked, head = (
        hidden[batch.rows, batch.columns - 1],
        model.get_output_embeddings(),
    )  # the position before the label predicts it
    if is_plain_linear(head):
        return linear_cross_entropy(picked, head.weight, labels)
    return F.cross_entropy(head(picked).float(), labels, reduction="sum")


def needs_full_logits(model: Any) -> bool:
    """Return whether logits are more than hidden states times LM head: soft-capped, scaled, or a soft prompt."""
    return hasattr(model, "peft_config") or any(
        getattr(model.config, name, None) not in (None, 0, 1) for name in LOGIT_TRANSFORMS
    )


def _compute_label_logits(model: Any, batch: PaddedBatch) -> Tensor:
    """Return logits at the labels of a padded batch [labels, vocabulary], without positions of a soft prompt."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits[:, -batch.ids.shape[1] :][
        batch.rows, batch.columns - 1
    ]
    return logits


def iter_label_logits(model: Any, batch: PaddedBatch | PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits [labels, vocabulary], labels) of a batch in chunks. For a model in one process."""
    if not isinstance(batch, PackedBatch) and needs_full_logits(model):
        yield _compute_label_logits(model, batch).float(), batch.ids[batch.rows, batch.columns]
        return
    labels, states, head = get_label_states(model, batch)
    size = get_chunk_size(model.config.vocab_size)
    for first in range(0, len(states), size):
        yield head(states[first : first + size]).float(), labels[first : first + size]


def get_label_states(model: Any, batch: PaddedBatch | PackedBatch) -> tuple[Tensor, Tensor, Any]:
    """Return (labels [n], hidden states that predict them [n, hidden size], LM head).

    For a model in one process for which `needs_full_logits` is false.
    """
    head = model.get_output_embeddings()
    if isinstance(batch, PackedBatch):
        at = batch.label_ids[:, 1:] != IGNORE_INDEX
        states = model.decoder(model.get_input_embeddings()(batch.ids), batch.positions, segments=batch.segments)[
            :, :-1
        ][at]
        return batch.label_ids[:, 1:][at], states, head
    states = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns - 1]
    return batch.ids[batch.rows, batch.columns], states, head


class NeftuneNoise:
    """NEFTune: uniform noise on input embeddings during training (Jain et al. 2023, arXiv:2310.05914).

    The magnitude is at most alpha / sqrt(tokens of the sequence * hidden size).
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha, self.lengths = alpha, torch.ones(())
        model.get_input_embeddings().register_forward_hook(self._add_noise)

    def _add_noise(self, table: Any, _: Any, embedded: Tensor) -> Tensor:
        if not table.training:
            return embedded
        magnitude = self.alpha / (self.lengths * embedded.shape[-1]).sqrt()  # [rows, length or 1]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * magnitude[..., None].to(embedded)

    def wrap_loss(self, loss: Loss) -> Loss:
        """Wrap a loss so that the noise knows the sequence lengths of its batch."""

        def noisy(model: Any, batch: Any) -> Tensor:
            if isinstance(batch, PackedBatch):
                counts = batch.segments[0].bincount()
                self.lengths = counts[batch.segments].float()
            else:
                self.lengths = batch.lengths[:, None].to(batch.ids.device).float()
            return loss(model, batch)

        return noisy
