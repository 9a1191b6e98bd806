"""Best-fit-decreasing (BFD) bin packing of sequences into rows of one capacity, without truncation.

Johnson (1974); for training data Ding et al. (2024), "Fewer Truncations Improve Language Modeling".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pack_best_fit(lengths: Sequence[int] | Any, capacity: int, seed: int) -> tuple[Any, Any]:
    """Pack sequences; returns (order, ends): sequence indices row by row, and where in `order` each row ends.

    Rows, and sequences of equal length, are shuffled by the seed.

    Every length is from 1 to `capacity`. Each sequence, longest first, goes into the row with the least sufficient free
    space. That row is found by the lowest set bit of an integer in which bit n means that some row has n free.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    sizes = np.asarray(lengths, dtype=np.int64)
    shuffled = generator.permutation(len(sizes))
    descending = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    rows: list[list[int]] = []
    having: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by free space
    free_sizes = 0
    for piece, size in zip(descending.tolist(), sizes[descending].tolist(), strict=True):
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = having[free].pop()
            if not having[free]:
                free_sizes ^= 1 << free
            rows[row].append(piece)
        else:
            free, row = capacity, len(rows)
            rows.append([piece])
        left = free - size
        if left:
            if not having[left]:
                free_sizes |= 1 << left
            having[left].append(row)
    mixed = [rows[i] for i in generator.permutation(len(rows)).tolist()]
    # shuffle within rows too, or the longest sequence would always come first
    order = np.array(
        [piece for row in mixed for piece in (row if len(row) == 1 else generator.permutation(row).tolist())],
        dtype=np.int64,
    )
    return order, np.cumsum([len(row) for row in mixed], dtype=np.int64)
