"""One tensor of several models as a merge method sees it: read block by block, as often as needed, or whole.

Does not know the methods or the file format.

Blocks are the same in each pass, so that counts of one pass hold in the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmworks.merge.plan.plan import BLOCK

BlockFunction = Callable[[Sequence[Tensor], int], Tensor]  # (blocks of all inputs, block index) -> block of the result


@dataclass(frozen=True)
class TensorGroup:
    """`base`: index of the base model's input; `tensor_parameters`, `input_parameters`: parameters of the tensor and of
    each input.

    `read(first, count)`: `count` flat values of all inputs from `first` on, in `dtype`. `notes`: counts for the report.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: int | None
    tensor_parameters: Mapping[str, Any]
    input_parameters: Sequence[Mapping[str, Any]]
    read: Callable[[int, int], list[Tensor]]
    seed: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def non_base_inputs(self) -> list[int]:
        """Return the indices of the inputs other than the base."""
        return [at for at in range(len(self.input_parameters)) if at != self.base]

    def get_parameter(self, name: str = "weight") -> list[float]:
        """Return a parameter of each input other than the base."""
        return [float(self.input_parameters[at][name]) for at in self.non_base_inputs]

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks."""
        return -(-self.numel // BLOCK)

    def iter_blocks(self) -> Iterator[list[Tensor]]:
        """Yield all inputs, block after block."""
        for start in range(0, self.numel, BLOCK):
            yield self.read(start, min(BLOCK, self.numel - start))

    def make_generator(self, source: int, block: int) -> torch.Generator:
        """Return a random generator for a block of an input, seeded by seed, tensor, input and block alone, so that
        it is the same in each pass and on any number of threads.
        """
        return torch.Generator().manual_seed(self._seed(source, block))

    def random_words(self, source: int, block: int, count: int) -> Any:
        """Return random 64-bit words as a numpy array, seeded the same way; from a small fast generator
        (Doty-Humphrey's SFC64), whose stream numpy guarantees.
        """
        return np.random.SFC64(self._seed(source, block)).random_raw(count)

    def _seed(self, source: int, block: int) -> int:
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{source}:{block}".encode()).digest()
        return int.from_bytes(digest[:7], "little")


def task_vectors(group: TensorGroup, blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return the task vectors: differences of the inputs from the base."""
    assert group.base is not None
    base = blocks[group.base]
    return [blocks[at] - base for at in group.non_base_inputs]
