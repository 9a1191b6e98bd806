"""Small changes left out, the sign by what most of the change has, the mean of those that agree. Yadav et al. 2023 (arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmworks.merge.group import Group, Piece, deltas
from llmworks.merge.methods.ranks import Ranks, ranks_of, sums_of
from llmworks.merge.methods.task_arithmetic import added, check
from llmworks.merge.methods.task_arithmetic import kept as kept_of


def ties(group: Group) -> Piece:
    """`density`: the share of each model's changes that is kept, by size."""
    check(group)
    kept = ranks_of(group, [_most(float(density), group.count) for density in group.weights("density")])
    factors = sums_of(group, kept)

    def piece(blocks: Sequence[Tensor], number: int) -> Tensor:
        return added(group, blocks, [one if rank is None else _scaled(rank, one, number, factor) for one, rank, factor in zip(deltas(group, blocks), kept, factors, strict=True)], elect=True)

    return piece


def _most(density: float, count: int) -> tuple[int, int] | None:
    """(how many of the largest are left out, how many of those behind them are kept); None: all."""
    if density >= 1:
        return None
    return 0, 0 if density <= 0 or not count else max(1, int(density * count))


def _scaled(rank: Ranks, change: Tensor, number: int, factor: Tensor | None) -> Tensor:
    found = kept_of(change, rank.mask(change, number))
    return found if factor is None else found * factor
