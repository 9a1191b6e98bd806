"""Stage `quantize.awq`: columns that read large inputs are made larger before weights are rounded to the nearest whole
number, and what they read smaller.

Lin et al. 2023 (arXiv:2306.00978). Norms, values and the upper matrix of the feed-forward layer take the scales up, so
that nothing is computed more; values of grouped heads share theirs.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig, WholeConfig


class AwqConfig(CalibratedConfig, WholeConfig):
    """How ranges are found."""

    symmetric: bool = Field(
        False, description="whole numbers around 0; else with a zero point, of the same bits, for each group"
    )
    apply_clip: bool = Field(
        True,
        description=(
            "ranges of groups by what their part of the outputs loses, in place of those of the largest weights"
        ),
    )


def awq(config: AwqConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in the form of compressed-tensors.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import Awq
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        Awq(config.num_calibration_samples, clip=config.apply_clip),
        Grid(config.bits, config.group_size, symmetric=config.symmetric),
        {"method": "awq"},
        config.save_format,
    )
