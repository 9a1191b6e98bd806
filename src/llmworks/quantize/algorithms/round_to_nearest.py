"""Round each weight independently, without calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmworks.model.lowbit.integer import Grid, Whole, grouped, searched, whole
from llmworks.quantize.calibrate.layerwise import Part, Passing, layer_of


class Nearest:
    """Round-to-nearest. `quantize_matrix`: from a matrix [rows, columns] and its grid to the quantized matrix."""

    texts = 0

    def __init__(self, matrix_of: Callable[[Tensor, Any], Any] = whole) -> None:
        self.matrix_of = matrix_of

    def prepare(self, passing: Passing, grids: Callable[[str], Any]) -> None:
        """Do nothing: no preparation is needed."""

    def part(self, passing: Passing, part: Part, grids: Callable[[str], Any]) -> dict[str, Any]:
        """Quantize the layers of a part."""
        wanted = {name: grids(name) for name in part.layers}
        return {
            name: self.matrix_of(layer_of(passing.block, name).weight, grid)
            for name, grid in wanted.items()
            if grid is not None
        }


def best_ranges(weight: Tensor, grid: Grid) -> Whole:
    """Round to nearest with the scales of least squared error."""
    return whole(weight, grid, searched(grouped(weight, grid), grid))
