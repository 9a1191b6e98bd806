"""Packed rows as training steps. The step number decides which rows a step reads, so that a run resumes anywhere."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.data.store.packed_tokens import PackedDataset, collate_packed
from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows of several documents without attention across documents; each tensor is [rows, length].

    Positions restart with each document; labels are IGNORED where the token is not trained on.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    label_ids: Tensor
    labels: int
    tokens: int
    where: str


class PackedSteps(Sequence[list[Callable[[], PackedBatch]]]):
    """`steps` steps of `num_micro_batches` micro-batches of `batch_size` rows each, shuffled by seed and epoch.

    A step's rows do not depend on how they are divided into micro-batches.

    `shard` (index, count): which share of each step's rows belongs to this process when several divide them.
    """

    def __init__(
        self,
        packed: PackedDataset,
        steps: int,
        *,
        batch_size: int,
        num_micro_batches: int,
        length: int,
        seed: int,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if len(packed) < batch_size * num_micro_batches:
            raise DataError(
                f"the data has {len(packed):,} rows, a step needs {batch_size * num_micro_batches:,} (batch_size"
                f" {batch_size},"
                f" gradient_accumulation_steps {num_micro_batches}); provide more data, or make the step smaller"
            )
        (
            self.packed,
            self.steps,
            self.batch_size,
            self.num_micro_batches,
            self.length,
            self.seed,
            self.device,
            self.shard,
        ) = (
            packed,
            steps,
            batch_size,
            num_micro_batches,
            length,
            seed,
            device,
            shard,
        )

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, step: int) -> list[Callable[[], PackedBatch]]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[list[Callable[[], PackedBatch]]]: ...
    def __getitem__(self, step: int | slice) -> Any:
        """Return the factories of a step's micro-batches."""
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.steps))]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        numbers, (at, shares) = self.get_row_indices(step), self.shard
        numbers = numbers[at * len(numbers) // shares : (at + 1) * len(numbers) // shares]
        return [
            functools.partial(self.collate, numbers[i : i + self.batch_size])
            for i in range(0, len(numbers), self.batch_size)
        ]

    def get_row_indices(self, step: int) -> list[int]:
        """Return the row indices of a step.

        Rows left over at the end of an epoch are skipped, so that no step reads a row twice.
        """
        each = self.batch_size * self.num_micro_batches
        epoch, place = divmod(step, len(self.packed) // each)
        order = _permute_rows(len(self.packed), self.seed, epoch)
        found: list[int] = order[place * each : (place + 1) * each].tolist()
        return found

    def collate(self, row_indices: Sequence[int]) -> PackedBatch:
        """Collate these rows."""
        rows = [self.packed[number] for number in row_indices]
        arrays = {
            name: torch.from_numpy(array).to(self.device) for name, array in collate_packed(rows, self.length).items()
        }
        label_mask = arrays["learned"].clone()
        label_mask[:, 0] = False  # nothing predicts a row's first token
        label_ids = arrays["input_ids"].masked_fill(~label_mask, IGNORE_INDEX)
        return PackedBatch(
            arrays["input_ids"],
            arrays["position_ids"],
            arrays["segment_ids"],
            label_ids,
            int(label_mask.sum()),
            sum(len(row.ids) for row in rows),
            f"rows {', '.join(map(str, row_indices))}",
        )


def check_tokenizer(data: Dataset, tokenizer: Any, name: str) -> None:
    """Check that the packed tokens come from this tokenizer.

    Errors: DataError when the digest of the tokenizer differs.
    """
    recorded = data.about.get("tokenizer")
    if (
        recorded
        and hasattr(tokenizer, "_tokenizer")
        and recorded != hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest()
    ):
        raise DataError(
            f"{data.name}: packed with another tokenizer than that of {name}; pack it again (llmworks data"
            f" pack {name} ...)"
        )


@functools.lru_cache(maxsize=2)
def _permute_rows(rows: int, seed: int, epoch: int) -> Any:
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(rows)


def packed_loss(model: Any, batch: PackedBatch) -> Tensor:
    """Compute the summed cross-entropy in nats of a batch's labels, for any model that returns a mean loss.

    The load-balancing loss of mixture-of-experts models is weighted by the number of labels, too.
    """
    mean: Tensor = model(
        input_ids=batch.ids, position_ids=batch.positions, segment_ids=batch.segments, labels=batch.label_ids
    ).loss
    return mean * batch.labels
