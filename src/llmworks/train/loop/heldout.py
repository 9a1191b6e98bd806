"""Evaluate a language model on held-out packed tokens: loss, perplexity, bits per byte.

Works for any model that returns a loss for labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmworks.data.store.packed_tokens import Packed, stack


@dataclass(frozen=True)
class HeldOut:
    """Total loss of all label tokens in nats, their number, and the bytes of text that they encode."""

    nats: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Mean cross-entropy per label token, in nats."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross-entropy."""
        return math.exp(min(700.0, self.per_token))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers. Control tokens count in the loss but encode no bytes."""
        return self.nats / math.log(2) / max(1, self.bytes)


def measure(model: Any, packed: Packed, tokenizer: Any, *, rows: int = 0, batch: int = 8) -> HeldOut:
    """Evaluate on the first `max_rows` packed rows (0 = all), without attention across documents of a row.

    Bytes are those of the label tokens.
    """
    import torch

    from llmworks.model.loss.linear_cross_entropy import IGNORED

    training, device = model.training, model.device
    model.train(False)
    nats, tokens, size = 0.0, 0, 0
    count = min(rows, len(packed)) if rows else len(packed)
    with torch.no_grad():
        for start in range(0, count, batch):
            chosen = [packed[i] for i in range(start, min(start + batch, count))]
            arrays = stack(chosen, max(len(row.ids) for row in chosen))
            given = {
                name: torch.from_numpy(arrays[name]).to(device) for name in ("input_ids", "position_ids", "segment_ids")
            }
            learned = torch.from_numpy(arrays["learned"]).to(device)
            labels = given["input_ids"].masked_fill(~learned, IGNORED)
            here = int(learned[:, 1:].sum())
            nats += float(model(**given, labels=labels).loss) * here
            tokens += here
            size += sum(_bytes(tokenizer, row) for row in chosen)
    model.train(training)
    return HeldOut(nats, tokens, size)


def _bytes(tokenizer: Any, row: Any) -> int:
    """Count the UTF-8 bytes of a row's label tokens, decoded in contiguous runs."""
    import numpy as np

    learned = np.append(False, row.learned[1:])
    edges = np.flatnonzero(np.diff(np.concatenate(([False], learned, [False])).astype(np.int8)))
    runs = [row.ids[low:high].tolist() for low, high in zip(edges[::2], edges[1::2], strict=True)]
    texts = tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode("utf-8")) for text in texts)
