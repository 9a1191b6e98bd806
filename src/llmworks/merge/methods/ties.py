"""TIES: trim small changes, elect the majority sign, average the changes that agree with it.

Yadav et al. 2023 (arXiv:2306.01708).
"""

from __future__ import annotations

from llmworks.merge.execute.tensor_group import Group, Piece
from llmworks.merge.methods.ranks import chosen, ranks_of, sums_of
from llmworks.merge.methods.task_arithmetic import added, check


def ties(group: Group) -> Piece:
    """Merge by TIES. `density`: fraction of each model's changes that is kept, by magnitude."""
    check(group)
    kept = ranks_of(group, [_most(float(density), group.count) for density in group.weights("density")])
    factors = sums_of(group, kept)

    return lambda blocks, number: added(group, blocks, chosen(group, blocks, kept, factors, number), elect=True)


def _most(density: float, count: int) -> tuple[int, int] | None:
    """Return (number of largest changes dropped, number kept after them); None: all are kept."""
    if density >= 1:
        return None
    return 0, 0 if density <= 0 or not count else max(1, int(density * count))
