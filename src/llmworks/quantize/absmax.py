"""Stage `quantize.absmax`: weights as whole numbers around 0, the largest of a group at the end of the range, each
rounded to the nearest.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import WholeConfig


class AbsmaxConfig(WholeConfig):
    """Where the range ends."""

    search: bool = Field(False, description="ranges of least squared error in place of those of the largest weights")


def absmax(config: AbsmaxConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in the form of compressed-tensors; `data`: what the damage is measured on.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid, whole
    from llmworks.quantize.algorithms.round_to_nearest import Nearest, best_ranges
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        Nearest(best_ranges if config.search else whole),
        Grid(config.bits, config.group),
        {"method": "absmax"},
        config.form,
    )
