"""Allocate bits to parts within a budget at the least total cost. Pure functions.

As EXL2 does over a table of measured errors (turboderp, exllamav2); here by marginal gains on each part's lower convex
hull, which is within one step of the optimum of the relaxed problem (Shoham and Gersho 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Return the choice of each part. costs, sizes: [parts][choices], sizes increasing; budget: maximum total size.

    Errors: ValueError when the smallest choices exceed the budget.
    """
    chosen = [0] * len(costs)
    used = sum(size[0] for size in sizes)
    if used > budget:
        raise ValueError(f"the smallest choices take {used:g}, which exceeds the budget of {budget:g}")
    steps = sorted(
        (
            step
            for part, (cost, size) in enumerate(zip(costs, sizes, strict=True))
            for step in find_hull_steps(part, cost, size)
        ),
        key=lambda step: -step[0],
    )
    stopped: set[int] = set()
    for _, part, choice in steps:  # a part's own steps are in order, since gains decrease along its hull
        more = sizes[part][choice] - sizes[part][chosen[part]]
        if part in stopped or used + more > budget:
            stopped.add(part)
            continue
        chosen[part], used = choice, used + more
    return chosen


def find_hull_steps(part: int, cost: Sequence[float], size: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return (gain per unit of size, part, choice) of the steps along the lower convex hull, gains decreasing."""
    corners = [0]
    for choice in range(1, len(cost)):
        while len(corners) > 1 and _gain(cost, size, corners[-2], corners[-1]) <= _gain(
            cost, size, corners[-2], choice
        ):
            corners.pop()
        if cost[choice] < cost[corners[-1]]:
            corners.append(choice)
    return [(_gain(cost, size, first, then), part, then) for first, then in pairwise(corners)]


def _gain(cost: Sequence[float], size: Sequence[float], first: int, then: int) -> float:
    return (cost[first] - cost[then]) / (size[then] - size[first])
