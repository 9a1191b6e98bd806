"""GloVe: word vectors whose dot products fit log co-occurrence counts (Pennington, Socher & Manning 2014).

    minimise over all pairs: f(X) (w . c + b + b' - log X)^2,   f(X) = min(1, (X / most)^power)

X sums 1 / distance within a window. Pure functions of word ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MAX_PENDING = 1 << 24  # buffered pairs before a merge


def count_cooccurrences(texts: Iterable[Any], vocab_size: int, window: int) -> tuple[Any, Any, Any]:
    """Count co-occurrences; returns (word, context word, X) of every ordered pair within `window` of each other.

    texts: numpy arrays of word ids, -1 for out-of-vocabulary words.
    """
    import numpy as np

    keys: Any = np.zeros(0, dtype=np.int64)
    sums: Any = np.zeros(0)
    pending: list[tuple[Any, Any]] = []

    def merge() -> None:
        nonlocal keys, sums
        every, inverse = np.unique(np.concatenate([keys, *(k for k, _ in pending)]), return_inverse=True)
        keys, sums = every, np.bincount(inverse, np.concatenate([sums, *(w for _, w in pending)]), minlength=len(every))
        pending.clear()

    waiting = 0
    for text in texts:
        for distance in range(1, min(window, len(text) - 1) + 1):
            one, other = text[:-distance], text[distance:]
            both = (one >= 0) & (other >= 0)
            one, other = one[both].astype(np.int64), other[both].astype(np.int64)
            pending.append(
                (
                    np.concatenate([one * vocab_size + other, other * vocab_size + one]),
                    np.full(2 * len(one), 1 / distance),
                )
            )
            waiting += 2 * len(one)
        if waiting > MAX_PENDING:
            merge()
            waiting = 0
    merge()
    return keys // vocab_size, keys % vocab_size, sums


def train_glove(
    pairs: tuple[Any, Any, Any],
    vocab_size: int,
    dimensions: int,
    *,
    epochs: int,
    learning_rate: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    batch_size: int = 4096,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Train vectors [words, dimensions], each the sum of word and context vector, with AdaGrad on batches of pairs.

    `on_epoch` is called with epoch and mean loss after every epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.from_numpy(x) for x in pairs[:2])
    log, weight = (torch.from_numpy(x).float() for x in (pairs[2], pairs[2]))
    log, weight = log.log(), (weight / x_max).pow(alpha).clamp(max=1)
    # the bias is an extra dimension of each vector, multiplied by 1 in the other
    tables = [(torch.rand(vocab_size, dimensions + 1, generator=generator) - 0.5) / dimensions for _ in range(2)]
    squares = [torch.ones_like(table) for table in tables]
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(log), generator=generator), batch_size):
            at = (first[chosen], second[chosen])
            w, c = (table[i] for table, i in zip(tables, at, strict=True))
            error = (w[:, :-1] * c[:, :-1]).sum(1) + w[:, -1] + c[:, -1] - log[chosen]
            slope = weight[chosen] * error
            total += float((slope * error).sum()) / 2
            for table, square, i, other in zip(tables, squares, at, (c, w), strict=True):
                by = torch.cat((slope[:, None] * other[:, :-1], slope[:, None]), 1)
                touched, place = torch.unique(i, return_inverse=True)
                summed, squared = (
                    torch.zeros(len(touched), by.shape[1]).index_add_(0, place, x) for x in (by, by.square())
                )
                square[touched] += squared  # accumulated per pair, as in the reference implementation
                table[touched] -= learning_rate * summed / square[touched].sqrt()
        if on_epoch is not None:
            on_epoch(epoch, total / len(log))
    return (tables[0] + tables[1])[:, :-1].contiguous()
