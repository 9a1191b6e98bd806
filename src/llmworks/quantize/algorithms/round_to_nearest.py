"""Round each weight independently, without calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmworks.model.lowbit.integer import Grid, IntegerMatrix, quantize_matrix, search_scales, split_groups
from llmworks.quantize.calibrate.layerwise import BlockInputs, BlockPart, get_layer


class RoundToNearest:
    """Round-to-nearest. `quantize_matrix`: from a matrix [rows, columns] and its grid to the quantized matrix."""

    num_calibration_samples = 0

    def __init__(self, quantize_matrix: Callable[[Tensor, Any], Any] = quantize_matrix) -> None:
        self.quantize_matrix = quantize_matrix

    def prepare(self, block_inputs: BlockInputs, grids: Callable[[str], Any]) -> None:
        """Do nothing: no preparation is needed."""

    def quantize_part(self, block_inputs: BlockInputs, part: BlockPart, grids: Callable[[str], Any]) -> dict[str, Any]:
        """Quantize the layers of a part."""
        wanted = {name: grids(name) for name in part.layers}
        return {
            name: self.quantize_matrix(get_layer(block_inputs.block, name).weight, grid)
            for name, grid in wanted.items()
            if grid is not None
        }


def quantize_with_mse_scales(weight: Tensor, grid: Grid) -> IntegerMatrix:
    """Round to nearest with the scales of least squared error."""
    return quantize_matrix(weight, grid, search_scales(split_groups(weight, grid), grid))
