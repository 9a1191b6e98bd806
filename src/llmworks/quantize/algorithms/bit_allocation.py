"""Allocate bits to the parts of a model within a budget, by the estimated cost of each bit width.

See `mixed.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.lowbit.integer import Grid, quantize_matrix, search_scales, split_groups
from llmworks.quantize import run as rounding
from llmworks.quantize.algorithms.calibrated import GptqMethod
from llmworks.quantize.algorithms.knapsack import allocate
from llmworks.quantize.calibrate.calibration_data import load_samples
from llmworks.quantize.calibrate.layerwise import get_block_parts
from llmworks.quantize.calibrate.sensitivity import estimate_costs
from llmworks.tokenize.load import load_tokenizer

if TYPE_CHECKING:
    from llmworks.quantize.algorithms.config import MixedConfig

CLIPPING_RATIOS = (1.0, 0.9, 0.8, 0.7)  # clipping ratios that a candidate searches


def run(config: MixedConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Run `mixed.mixed`."""
    source = rounding.open_source(model)
    skip = rounding.make_ignore_filter(source, config.ignore)
    stored = rounding.choose_dtype(source, config.dtype)
    grids = [Grid(bits, config.group_size, symmetric=config.symmetric, stored=stored) for bits in config.bit_choices]
    ids, _ = load_samples(
        load_tokenizer(model.path),
        data,
        config.num_calibration_samples,
        config.eval_samples,
        config.max_seq_length,
        ctx.seed,
    )

    def make_candidates(name: str, weight: Tensor) -> Sequence[Tensor]:
        return (
            []
            if skip(name)
            else [
                quantize_matrix(
                    weight, grid, search_scales(split_groups(weight, grid), grid, shrink=CLIPPING_RATIOS)
                ).weight()
                for grid in grids
            ]
        )

    costs_by_layer = {
        name: cost
        for name, cost in estimate_costs(source, ids[: config.sensitivity_samples], ctx, make_candidates).items()
        if cost
    }
    grid_by_layer, expected = _allocate_bits(source, costs_by_layer, grids, config.bits)
    base = replace(grids[0], bits=int(config.bits))
    method = GptqMethod(config.num_calibration_samples, dampening_frac=0.01, act_order=True, mse_scales=True)
    return rounding.run(
        config,
        model,
        ctx,
        data,
        method,
        base,
        {"method": "mixed", "average": config.bits, "expected_kl": round(expected, 5)},
        grids=grid_by_layer,
    )


def _allocate_bits(
    source: LayerReader, costs_by_layer: Mapping[str, list[float]], grids: Sequence[Grid], budget: float
) -> tuple[dict[str, Grid], float]:
    """Return (each layer's grid, the expected KL divergence). Layers of a part have the same grid."""
    units: list[list[str]] = []
    sizes: dict[str, tuple[int, int]] = {}
    for number in range(source.shape.num_hidden_layers):
        block = source.load_block(number)
        for part in get_block_parts(block):
            named = []
            for layer in part.layers:
                name = source.rename(f"decoder.blocks.{number}.{layer}")
                if name in costs_by_layer:
                    rows, columns = block.get_parameter(f"{layer}.weight").shape
                    sizes[name] = (rows, columns)
                    named.append(name)
            if named:
                units.append(named)
    takes = [[sum(_count_bits(sizes[name], grid) for name in unit) for grid in grids] for unit in units]
    total = sum(rows * columns for rows, columns in sizes.values())
    try:
        choices = allocate(
            [[sum(costs_by_layer[name][choice] for name in unit) for choice in range(len(grids))] for unit in units],
            takes,
            budget * total,
        )
    except ValueError:
        raise ModelError(
            f"config.bits: {budget:g} bits per weight is less than {sum(min(take) for take in takes) / total:.3g},"
            " the minimum of config.bit_choices with their scales"
        ) from None
    grid_of = {name: grids[choice] for unit, choice in zip(units, choices, strict=True) for name in unit}
    return grid_of, sum(
        costs_by_layer[name][choice] for unit, choice in zip(units, choices, strict=True) for name in unit
    )


def _count_bits(shape: tuple[int, int], grid: Grid) -> float:
    """Return all bits of a matrix, 16-bit scales and zero points included."""
    rows, columns = shape
    return rows * columns * grid.bits + rows * (columns // grid.get_group_size(columns)) * (
        16 + (0 if grid.symmetric else grid.bits)
    )
