"""Packed rows as the steps of a training: which rows a step reads follows from its number, so that a run goes on
anywhere.

Knows no model.
"""

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
from llmworks.data.store.packed_tokens import Packed, stack
from llmworks.model.loss.linear_cross_entropy import IGNORED


@dataclass(frozen=True)
class PackedBatch:
    """Rows of several texts that do not see one another; each tensor [rows, length].

    Positions begin anew with each text; labels are IGNORED where nothing is learned.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    label_ids: Tensor
    labels: int
    tokens: int
    where: str


class PackedSteps(Sequence[list[Callable[[], PackedBatch]]]):
    """`steps` steps of `parts` parts of `rows` rows each, in an order shuffled by seed and epoch.

    A step's rows do not depend on how they are divided into parts.

    `share` (number, of how many): the parts that are this process's, where several divide the rows of a step.
    """

    def __init__(
        self,
        packed: Packed,
        steps: int,
        *,
        rows: int,
        parts: int,
        length: int,
        seed: int,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if len(packed) < rows * parts:
            raise DataError(
                f"the data has {len(packed):,} rows, a step takes {rows * parts:,} (batch {rows}, accumulation"
                f" {parts}); give more data, or make the step smaller"
            )
        self.packed, self.steps, self.rows, self.parts, self.length, self.seed, self.device, self.share = (
            packed,
            steps,
            rows,
            parts,
            length,
            seed,
            device,
            share,
        )

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, step: int) -> list[Callable[[], PackedBatch]]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[list[Callable[[], PackedBatch]]]: ...
    def __getitem__(self, step: int | slice) -> Any:
        """The makers of a step's parts."""
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.steps))]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        numbers, (at, shares) = self.numbers(step), self.share
        numbers = numbers[at * len(numbers) // shares : (at + 1) * len(numbers) // shares]
        return [functools.partial(self.batch, numbers[i : i + self.rows]) for i in range(0, len(numbers), self.rows)]

    def numbers(self, step: int) -> list[int]:
        """The rows of a step.

        What is left over at the end of an epoch is not read, so that no step reads a row twice.
        """
        each = self.rows * self.parts
        epoch, place = divmod(step, len(self.packed) // each)
        order = _order(len(self.packed), self.seed, epoch)
        found: list[int] = order[place * each : (place + 1) * each].tolist()
        return found

    def batch(self, numbers: Sequence[int]) -> PackedBatch:
        """These rows."""
        rows = [self.packed[number] for number in numbers]
        arrays = {name: torch.from_numpy(array).to(self.device) for name, array in stack(rows, self.length).items()}
        learned = arrays["learned"].clone()
        learned[:, 0] = False  # nothing predicts a row's first token
        label_ids = arrays["input_ids"].masked_fill(~learned, IGNORED)
        return PackedBatch(
            arrays["input_ids"],
            arrays["position_ids"],
            arrays["segment_ids"],
            label_ids,
            int(learned.sum()),
            sum(len(row.ids) for row in rows),
            f"rows {', '.join(map(str, numbers))}",
        )


def same_tokenizer(data: Dataset, tokenizer: Any, name: str) -> None:
    """Whether packed tokens are a tokenizer's.

    Errors: DataError for those of another, by its digest; ids alone may fit by chance.
    """
    recorded = data.about.get("tokenizer")
    if (
        recorded
        and hasattr(tokenizer, "_tokenizer")
        and recorded != hashlib.sha256(tokenizer._tokenizer.to_str().encode()).hexdigest()
    ):
        raise DataError(
            f"{data.name}: was packed with another tokenizer than {name}'s; pack it again (llmworks data pack {name}"
            " ...)"
        )


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Any:
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(rows)


def packed_loss(model: Any, batch: PackedBatch) -> Tensor:
    """Summed cross-entropy in nats of a batch's labels, by any model that gives a mean loss for labels.

    Experts' balance counts as often as labels do.
    """
    mean: Tensor = model(
        input_ids=batch.ids, position_ids=batch.positions, segment_ids=batch.segments, labels=batch.label_ids
    ).loss
    return mean * batch.labels
