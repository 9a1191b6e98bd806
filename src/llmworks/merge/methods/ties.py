"""Small changes left out, the sign by what most of the change has, the mean of those that agree.

Yadav et al. 2023 (arXiv:2306.01708).
"""

from __future__ import annotations

from llmworks.merge.execute.tensor_group import Group, Piece
from llmworks.merge.methods.ranks import chosen, ranks_of, sums_of
from llmworks.merge.methods.task_arithmetic import added, check


def ties(group: Group) -> Piece:
    """`density`: the share of each model's changes that is kept, by size."""
    check(group)
    kept = ranks_of(group, [_most(float(density), group.count) for density in group.weights("density")])
    factors = sums_of(group, kept)

    return lambda blocks, number: added(group, blocks, chosen(group, blocks, kept, factors, number), elect=True)


def _most(density: float, count: int) -> tuple[int, int] | None:
    """(how many of the largest are left out, how many of those behind them are kept); None: all."""
    if density >= 1:
        return None
    return 0, 0 if density <= 0 or not count else max(1, int(density * count))
