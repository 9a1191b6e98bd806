"""From conversations to training examples and batches: ids, labels, and batches of similar length. Knows no model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmworks.data.rows import Row
from llmworks.errors import ModelError, RequestError
from llmworks.tokenize.templates import for_template, render_masked
from llmworks.types import messages_from_json

BUCKET = 16  # batches sorted together by length


@dataclass(frozen=True)
class Example:
    """Token ids and, of the same length, 1 where the token is a label."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    @property
    def labels(self) -> int:
        """Number of label tokens; the first token can be none, since nothing predicts it."""
        return sum(self.mask[1:])


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. ids: [rows, length]; label positions as (row, column) of the token to be predicted."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    tokens: int

    @property
    def labels(self) -> int:
        """Number of label tokens."""
        return len(self.rows)


def make_example(tokenizer: Any, row: Row, max_tokens: int) -> Example | str:
    """The example of one conversation, or the reason why it cannot be trained on. Nothing is cut: a cut answer teaches no end."""
    try:
        messages, tools = for_template(tokenizer, messages_from_json(row["messages"]), row.get("tools") or ())
        rendered = render_masked(tokenizer, messages, tools=tools)
    except (RequestError, ModelError, ValueError) as error:
        return str(error)
    last = max((i for i, m in enumerate(rendered.mask) if m), default=0)
    ids, mask = rendered.ids[: last + 1], rendered.mask[: last + 1]  # what follows the last label teaches nothing
    if not any(mask[1:]):
        return "no assistant token to learn"
    if len(ids) > max_tokens:
        return f"{len(ids)} tokens, longer than max_tokens {max_tokens}"
    return Example(ids, mask)


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right. Causal attention never looks right, so padding needs no mask; it has no labels."""
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        mask[i, 1 : len(e.ids)] = torch.tensor(e.mask[1:], dtype=torch.bool)
    rows, columns = mask.nonzero(as_tuple=True)
    return Batch(ids, rows, columns, sum(len(e.ids) for e in examples))


def plan_epoch(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Indices of one epoch's batches: shuffled, sorted by length within buckets of 16 batches, batches shuffled again."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    span = size * BUCKET
    order = [i for start in range(0, len(order), span) for i in sorted(order[start : start + span], key=lambda j: lengths[j])]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches
