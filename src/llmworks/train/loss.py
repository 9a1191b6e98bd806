"""Losses as pure functions of a model and a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.model.linear_loss import IGNORED
from llmworks.train.examples import Batch


def next_token_loss(model: Any, batch: Batch) -> Tensor:
    """Summed cross-entropy in nats over the batch's label tokens.

    The output head runs on label positions only: for short answers to long prompts that saves most of its work.
    """
    if getattr(model, "head_on_labels", False):  # such models do so themselves
        label_ids = torch.full_like(batch.ids, IGNORED)
        label_ids[batch.rows, batch.columns] = batch.ids[batch.rows, batch.columns]
        mean: Tensor = model(input_ids=batch.ids, labels=label_ids).loss
        return mean * batch.labels
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, length, width]
    picked = hidden[batch.rows, batch.columns - 1]  # the position before predicts the label
    logits = model.get_output_embeddings()(picked).float()  # [labels, vocabulary]
    return F.cross_entropy(logits, batch.ids[batch.rows, batch.columns], reduction="sum")
