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
from llmworks.model.io.layer_reader import Source
from llmworks.model.lowbit.integer import Grid, grouped, searched, whole
from llmworks.quantize import run as rounding
from llmworks.quantize.algorithms.calibrated import Gptq
from llmworks.quantize.algorithms.knapsack import allocate
from llmworks.quantize.calibrate.layerwise import parts_of
from llmworks.quantize.calibrate.sensitivity import costs
from llmworks.quantize.calibrate.texts import calibration
from llmworks.tokenize.load import load_tokenizer

if TYPE_CHECKING:
    from llmworks.quantize.algorithms.config import MixedConfig

SHARES = (1.0, 0.9, 0.8, 0.7)  # clipping ratios that a candidate searches


def run(config: MixedConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Run `mixed.mixed`."""
    source = rounding.open_source(model)
    skip = rounding.skipping(source, config.ignore)
    stored = rounding.stored_of(source, config.dtype)
    grids = [Grid(bits, config.group_size, symmetric=config.symmetric, stored=stored) for bits in config.bit_choices]
    ids, _ = calibration(
        load_tokenizer(model.path),
        data,
        config.num_calibration_samples,
        config.eval_samples,
        config.max_seq_length,
        ctx.seed,
    )

    def tries(name: str, weight: Tensor) -> Sequence[Tensor]:
        return (
            []
            if skip(name)
            else [whole(weight, grid, searched(grouped(weight, grid), grid, shrink=SHARES)).weight() for grid in grids]
        )

    found = {name: cost for name, cost in costs(source, ids[: config.sensitivity_samples], ctx, tries).items() if cost}
    chosen, expected = _chosen(source, found, grids, config.bits)
    base = replace(grids[0], bits=int(config.bits))
    method = Gptq(config.num_calibration_samples, damping=0.01, by_activation=True, search=True)
    return rounding.run(
        config,
        model,
        ctx,
        data,
        method,
        base,
        {"method": "mixed", "average": config.bits, "expected_kl": round(expected, 5)},
        grids=chosen,
    )


def _chosen(
    source: Source, found: Mapping[str, list[float]], grids: Sequence[Grid], budget: float
) -> tuple[dict[str, Grid], float]:
    """Return (each layer's grid, the expected KL divergence). Layers of a part have the same grid."""
    units: list[list[str]] = []
    sizes: dict[str, tuple[int, int]] = {}
    for number in range(source.shape.num_hidden_layers):
        block = source.block(number)
        for part in parts_of(block):
            named = []
            for layer in part.layers:
                name = source.rename(f"decoder.blocks.{number}.{layer}")
                if name in found:
                    rows, columns = block.get_parameter(f"{layer}.weight").shape
                    sizes[name] = (rows, columns)
                    named.append(name)
            if named:
                units.append(named)
    takes = [[sum(_bits(sizes[name], grid) for name in unit) for grid in grids] for unit in units]
    total = sum(rows * columns for rows, columns in sizes.values())
    try:
        choices = allocate(
            [[sum(found[name][choice] for name in unit) for choice in range(len(grids))] for unit in units],
            takes,
            budget * total,
        )
    except ValueError:
        raise ModelError(
            f"config.bits: {budget:g} bits per weight is less than {sum(min(take) for take in takes) / total:.3g},"
            " the minimum of config.bit_choices with their scales"
        ) from None
    grid_of = {name: grids[choice] for unit, choice in zip(units, choices, strict=True) for name in unit}
    return grid_of, sum(found[name][choice] for unit, choice in zip(units, choices, strict=True) for name in unit)


def _bits(shape: tuple[int, int], grid: Grid) -> float:
    """Return all bits of a matrix, 16-bit scales and zero points included."""
    rows, columns = shape
    return rows * columns * grid.bits + rows * (columns // grid.size(columns)) * (
        16 + (0 if grid.symmetric else grid.bits)
    )
