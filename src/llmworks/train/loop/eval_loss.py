"""Evaluate a language model on held-out packed tokens: loss, perplexity, bits per byte.

Works for any model that returns a loss for labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmworks.data.store.packed_tokens import PackedDataset, collate_packed


@dataclass(frozen=True)
class EvalLoss:
    """Total loss of all label tokens in nats, their number, and the bytes of text that they encode."""

    total_nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy per label token, in nats."""
        return self.total_nats / max(1, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross-entropy."""
        return math.exp(min(700.0, self.loss))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers. Control tokens count in the loss but encode no bytes."""
        return self.total_nats / math.log(2) / max(1, self.num_bytes)


def evaluate_loss(
    model: Any, packed: PackedDataset, tokenizer: Any, *, max_rows: int = 0, batch_size: int = 8
) -> EvalLoss:
    """Evaluate on the first `max_rows` packed rows (0 = all), without attention across documents of a row.

    Bytes are those of the label tokens.
    """
    import torch

    from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX

    training, device = model.training, model.device
    model.train(False)
    nats, tokens, size = 0.0, 0, 0
    count = min(max_rows, len(packed)) if max_rows else len(packed)
    with torch.no_grad():
        for start in range(0, count, batch_size):
            batch_rows = [packed[i] for i in range(start, min(start + batch_size, count))]
            arrays = collate_packed(batch_rows, max(len(row.ids) for row in batch_rows))
            inputs = {
                name: torch.from_numpy(arrays[name]).to(device) for name in ("input_ids", "position_ids", "segment_ids")
            }
            label_mask = torch.from_numpy(arrays["learned"]).to(device)
            labels = inputs["input_ids"].masked_fill(~label_mask, IGNORE_INDEX)
            num_labels = int(label_mask[:, 1:].sum())
            nats += float(model(**inputs, labels=labels).loss) * num_labels
            tokens += num_labels
            size += sum(_count_label_bytes(tokenizer, row) for row in batch_rows)
    model.train(training)
    return EvalLoss(nats, tokens, size)


def _count_label_bytes(tokenizer: Any, row: Any) -> int:
    """Count the UTF-8 bytes of a row's label tokens, decoded in contiguous runs."""
    import numpy as np

    label_mask = np.append(False, row.loss_mask[1:])
    edges = np.flatnonzero(np.diff(np.concatenate(([False], label_mask, [False])).astype(np.int8)))
    runs = [row.ids[low:high].tolist() for low, high in zip(edges[::2], edges[1::2], strict=True)]
    texts = tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode("utf-8")) for text in texts)
