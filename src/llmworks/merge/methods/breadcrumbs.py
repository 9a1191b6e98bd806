"""Model Breadcrumbs: drop the smallest and the very largest changes. Davari and Belilovsky 2023 (arXiv:2312.06795)."""

from __future__ import annotations

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup
from llmworks.merge.methods.ranks import compute_rescale_factors, select_changes, select_ranks
from llmworks.merge.methods.task_arithmetic import add_task_vectors, check_weights


def breadcrumbs(group: TensorGroup) -> BlockFunction:
    """Merge by breadcrumbs. `density`: fraction of changes that is kept; `gamma`: fraction of largest changes
    dropped.
    """
    return _breadcrumbs(group, elect=False)


def breadcrumbs_ties(group: TensorGroup) -> BlockFunction:
    """Merge by breadcrumbs with TIES sign election."""
    return _breadcrumbs(group, elect=True)


def _breadcrumbs(group: TensorGroup, *, elect: bool) -> BlockFunction:
    check_weights(group)
    masks = select_ranks(
        group,
        [
            _get_rank_range(density, gamma, group.numel)
            for density, gamma in zip(group.get_parameter("density"), group.get_parameter("gamma"), strict=True)
        ],
        ascending=True,
    )
    factors = compute_rescale_factors(group, masks)

    return lambda blocks, number: add_task_vectors(
        group, blocks, select_changes(group, blocks, masks, factors, number), elect=elect
    )


def _get_rank_range(density: float, gamma: float, count: int) -> tuple[int, int] | None:
    """Return (number of smallest changes dropped, number kept after them); fewer of the largest are dropped if the
    density requires it. None: all are kept.
    """
    if density >= 1:
        return None
    wanted = int(density * count)
    return max(0, count - wanted - int(gamma * count)), wanted
