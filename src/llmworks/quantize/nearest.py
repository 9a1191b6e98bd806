"""Rounding to the nearest whole number, with nothing known of what layers read."""

from __future__ import annotations

from collections.abc import Callable

from llmworks.model.grid import Grid, Whole, grouped, searched, whole
from llmworks.quantize.walk import Part, Passing, layer_of


class Nearest:
    """Each weight by itself. search: scales of least squared error, else those of the largest weights."""

    texts = 0

    def __init__(self, *, search: bool) -> None:
        self.search = search

    def prepare(self, passing: Passing, grids: Callable[[str], Grid | None]) -> None:
        """Nothing."""

    def part(self, passing: Passing, part: Part, grid: Callable[[str], Grid | None]) -> dict[str, Whole]:
        """The layers of a part."""
        found = {}
        for name in part.layers:
            wanted, weight = grid(name), layer_of(passing.block, name).weight
            if wanted is not None:
                found[name] = whole(weight, wanted, searched(grouped(weight, wanted), wanted) if self.search else None)
        return found
