"""Turn conversations and documents into tokenized training examples and batches."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from llmworks.core.errors import ModelError, RequestError, UserError
from llmworks.data.conversations.training_rows import tokenize_answers
from llmworks.data.store.rows import Row
from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX
from llmworks.train.loop.packed_steps import PackedBatch

BATCHES_PER_BUCKET = 16  # batches per bucket that is sorted by length


@dataclass(frozen=True)
class Example:
    """Token ids and a loss mask of the same length: 1 where the token is a label.

    `part`: number of the answer that it trains on, from 1; 0: all answers of the conversation.
    """

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    id: str = ""
    part: int = 0

    @property
    def labels(self) -> int:
        """Number of label tokens; the first token is never one, since nothing predicts it."""
        return sum(self.mask[1:])


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded examples.

    ids: [rows, length]; `rows` and `columns`: position of each label token; lengths: [rows].
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    lengths: Tensor
    where: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.lengths.sum())

    @property
    def labels(self) -> int:
        """Number of label tokens."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> PaddedBatch:
        """Move the batch to a device."""
        return PaddedBatch(self.ids.to(device), self.rows.to(device), self.columns.to(device), self.lengths, self.where)


def make_example(
    tokenizer: Any, row: Row, max_length: int, *, last: bool = False, truncate: bool = False
) -> Example | str:
    """Tokenize one row as one example, or return why it cannot be trained on; of several examples, the last one."""
    made = make_examples(tokenizer, row, max_length, last=last, truncate=truncate)
    return made if isinstance(made, str) else made[-1]


def make_examples(
    tokenizer: Any, row: Row, max_length: int, *, last: bool = False, truncate: bool = False
) -> list[Example] | str:
    """Tokenize one row (conversation, `text`, or `prompt` and `completion`), or return why it cannot be trained on.

    A conversation is one example, or one for each answer where the template rewrites earlier turns.

    `last`: train only on the last assistant turn. `truncate`: cut sequences that are too long at the end; otherwise
    they are rejected, since a truncated completion lacks its end token.
    """
    try:
        parts = tokenize_answers(tokenizer, row)
    except (RequestError, ModelError, ValueError) as error:
        return str(error)
    made: list[Example] = []
    for number, (ids, mask) in enumerate(parts[-1:] if last else parts, 1):
        if last:
            mask = _keep_last_run(mask)
        if truncate:
            ids, mask = ids[:max_length], mask[:max_length]
        end = max((i for i, m in enumerate(mask) if m), default=0)
        ids, mask = ids[: end + 1], mask[: end + 1]  # tokens after the last label have no effect on the loss
        if not any(mask[1:]):
            return "no assistant tokens to train on" if "messages" in row else "no tokens to train on"
        if len(ids) > max_length:
            return f"{len(ids)} tokens, longer than max_length {max_length}"
        name = str(row["id"])
        part = (len(parts) if last else number) if len(parts) > 1 else 0
        made.append(Example(tuple(ids), tuple(mask), f"{name}~{part}" if part > 1 else name, part))
    return made


def _keep_last_run(mask: Sequence[int]) -> list[int]:
    """Keep only the last run of ones."""
    end = max((i for i, m in enumerate(mask) if m), default=-1)
    begin = end
    while begin > 0 and mask[begin - 1]:
        begin -= 1
    return [int(begin <= i <= end and bool(m)) for i, m in enumerate(mask)]


def collate(examples: Sequence[Example]) -> PaddedBatch:
    """Pad on the right. Causal attention never attends to right padding, so no attention mask is needed.

    Padding has no labels.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        mask[i, 1 : len(e.ids)] = torch.tensor(e.mask[1:], dtype=torch.bool)
    rows, columns = mask.nonzero(as_tuple=True)
    return PaddedBatch(ids, rows, columns, torch.tensor([len(e.ids) for e in examples]), format_row_ids(examples))


def collate_padding_free(examples: Sequence[Example], device: torch.device | str = "cpu") -> PackedBatch:
    """Concatenate examples in one row without padding; no attention across examples, positions restart at 0."""
    ids = torch.tensor([[i for e in examples for i in e.ids]], device=device)
    labels = torch.tensor(
        [
            [
                i if m and place else IGNORE_INDEX
                for e in examples
                for place, (i, m) in enumerate(zip(e.ids, e.mask, strict=True))
            ]
        ],
        device=device,
    )
    positions = torch.tensor([[place for e in examples for place in range(len(e.ids))]], device=device)
    segments = torch.tensor([[number for number, e in enumerate(examples) for _ in e.ids]], device=device)
    return PackedBatch(
        ids, positions, segments, labels, sum(e.labels for e in examples), ids.shape[1], format_row_ids(examples)
    )


def format_row_ids(examples: Sequence[Any]) -> str:
    """Name the rows of a batch, to find one that broke a training."""
    names = [e.id for e in examples if e.id]
    return f"rows {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else ""


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, *, by_length: bool = True) -> list[list[int]]:
    """Return the example indices of one epoch's batches, shuffled.

    `by_length`: sort by length within buckets of 16 batches, so that there is little padding, then shuffle the batches.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if by_length:
        span = batch_size * BATCHES_PER_BUCKET
        order = [
            i
            for start in range(0, len(order), span)
            for i in sorted(order[start : start + span], key=lambda j: lengths[j])
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if by_length:
        rng.shuffle(batches)
    return batches


class ExampleSteps(Sequence[list[Callable[[], Any]]]):
    """The steps of a training over examples, determined by the seed: each a list of factories of micro-batches.

    A micro-batch has `batch_size` examples. `padding_free`: examples are concatenated without padding, else padded;
    `collate_fn`: collates a micro-batch's examples, given those of the whole step. `shard` (index, count): which share
    of each step's examples belongs to this process, in micro-batches of `micro_batch_size`; a remainder is dropped, so
    that all processes have the same number of micro-batches.

    Errors: UserError when no step has an example for each process.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        epochs: float,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        padding_free: bool,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
        micro_batch_size: int = 0,
        collate_fn: Callable[[Sequence[Any], Sequence[Any]], Any] | None = None,
    ) -> None:
        self.examples, self.micro_batch_size, self.padding_free, self.device, self.shard, self.collate_fn = (
            examples,
            micro_batch_size or batch_size,
            padding_free,
            device,
            shard,
            collate_fn,
        )
        lengths = [len(e.ids) for e in examples]
        wanted = max(1, round(epochs * -(-len(examples) // batch_size)))
        parts: list[list[int]] = []
        epoch = 0
        while len(parts) < wanted:
            parts += plan_epoch(lengths, batch_size, seed * 1000 + epoch, by_length=not padding_free)
            epoch += 1
        parts = parts[:wanted]
        self.steps = [
            [i for part in parts[at : at + gradient_accumulation_steps] for i in part]
            for at in range(0, len(parts), gradient_accumulation_steps)
        ]
        self.steps = [step for whole in self.steps if (step := whole[: len(whole) // shard[1] * shard[1]])]
        if not self.steps:
            raise UserError(f"{len(examples)} rows cannot be divided among {shard[1]} processes; start fewer processes")

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, step: int) -> list[Callable[[], Any]]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[list[Callable[[], Any]]]: ...
    def __getitem__(self, step: int | slice) -> Any:
        """Return the factories of a step's micro-batches."""
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        at, shares = self.shard
        whole = self.steps[step]
        own = whole[at * len(whole) // shares : (at + 1) * len(whole) // shares]
        return [
            functools.partial(self.collate, own[i : i + self.micro_batch_size], whole)
            for i in range(0, len(own), self.micro_batch_size)
        ]

    def collate(self, numbers: Sequence[int], step: Sequence[int] = ()) -> Any:
        """Collate these examples of a step as one batch."""
        some = [self.examples[i] for i in numbers]
        if self.collate_fn is not None:
            return self.collate_fn(some, [self.examples[i] for i in step or numbers])
        return collate_padding_free(some, self.device) if self.padding_free else collate(some).to(self.device)
