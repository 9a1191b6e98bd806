"""One tensor of several models as a method sees it: read block by block as often as it wants, or whole.

Knows no method and no file format.

Blocks are the same each time, so that what is counted in one reading is right in the next.
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

Piece = Callable[
    [Sequence[Tensor], int], Tensor
]  # (blocks of all inputs, the block's number) -> the block of the result


@dataclass(frozen=True)
class Group:
    """`base`: which input is the base; `shared`, `each`: parameters, of the tensor and of each input.

    `read(first, count)`: all inputs from a number on, flat, in `dtype`. `notes`: counted for the report.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: int | None
    shared: Mapping[str, Any]
    each: Sequence[Mapping[str, Any]]
    read: Callable[[int, int], list[Tensor]]
    seed: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Numbers of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def others(self) -> list[int]:
        """Inputs beside the base."""
        return [at for at in range(len(self.each)) if at != self.base]

    def weights(self, name: str = "weight") -> list[float]:
        """A parameter of each input beside the base."""
        return [float(self.each[at][name]) for at in self.others]

    @property
    def pieces(self) -> int:
        """Blocks."""
        return -(-self.count // BLOCK)

    def blocks(self) -> Iterator[list[Tensor]]:
        """All inputs, block after block."""
        for start in range(0, self.count, BLOCK):
            yield self.read(start, min(BLOCK, self.count - start))

    def generator(self, source: int, block: int) -> torch.Generator:
        """Random numbers of a block of an input: by seed, tensor, input and block alone, so that they are the same in
        each reading and on any number of threads.
        """
        return torch.Generator().manual_seed(self._seed(source, block))

    def words(self, source: int, block: int, count: int) -> Any:
        """Random words of 64 bits, a numpy array, under the same rule; from a small fast generator (Doty-Humphrey's
        SFC64), whose stream numpy keeps.
        """
        return np.random.SFC64(self._seed(source, block)).random_raw(count)

    def _seed(self, source: int, block: int) -> int:
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{source}:{block}".encode()).digest()
        return int.from_bytes(digest[:7], "little")


def deltas(group: Group, blocks: Sequence[Tensor]) -> list[Tensor]:
    """What the inputs beside the base differ by from it."""
    assert group.base is not None
    base = blocks[group.base]
    return [blocks[at] - base for at in group.others]
