"""Model Breadcrumbs: drop the smallest and the very largest changes. Davari and Belilovsky 2023 (arXiv:2312.06795)."""

from __future__ import annotations

from llmworks.merge.execute.tensor_group import Group, Piece
from llmworks.merge.methods.ranks import chosen, ranks_of, sums_of
from llmworks.merge.methods.task_arithmetic import added, check


def breadcrumbs(group: Group) -> Piece:
    """Merge by breadcrumbs. `density`: fraction of changes that is kept; `gamma`: fraction of largest changes
    dropped.
    """
    return _crumbs(group, elect=False)


def breadcrumbs_ties(group: Group) -> Piece:
    """Merge by breadcrumbs with TIES sign election."""
    return _crumbs(group, elect=True)


def _crumbs(group: Group, *, elect: bool) -> Piece:
    check(group)
    kept = ranks_of(
        group,
        [
            _middle(density, gamma, group.count)
            for density, gamma in zip(group.weights("density"), group.weights("gamma"), strict=True)
        ],
        upward=True,
    )
    factors = sums_of(group, kept)

    return lambda blocks, number: added(group, blocks, chosen(group, blocks, kept, factors, number), elect=elect)


def _middle(density: float, gamma: float, count: int) -> tuple[int, int] | None:
    """Return (number of smallest changes dropped, number kept after them); fewer of the largest are dropped if the
    density requires it. None: all are kept.
    """
    if density >= 1:
        return None
    wanted = int(density * count)
    return max(0, count - wanted - int(gamma * count)), wanted
