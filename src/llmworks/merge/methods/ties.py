"""TIES: trim small changes, elect the majority sign, average the changes that agree with it.

Yadav et al. 2023 (arXiv:2306.01708).
"""

from __future__ import annotations

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup
from llmworks.merge.methods.ranks import compute_rescale_factors, select_changes, select_ranks
from llmworks.merge.methods.task_arithmetic import add_task_vectors, check_weights


def ties(group: TensorGroup) -> BlockFunction:
    """Merge by TIES. `density`: fraction of each model's changes that is kept, by magnitude."""
    check_weights(group)
    masks = select_ranks(
        group, [_get_rank_range(float(density), group.numel) for density in group.get_parameter("density")]
    )
    factors = compute_rescale_factors(group, masks)

    return lambda blocks, number: add_task_vectors(
        group, blocks, select_changes(group, blocks, masks, factors, number), elect=True
    )


def _get_rank_range(density: float, count: int) -> tuple[int, int] | None:
    """Return (number of largest changes dropped, number kept after them); None: all are kept."""
    if density >= 1:
        return None
    return 0, 0 if density <= 0 or not count else max(1, int(density * count))
