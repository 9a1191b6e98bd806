"""Stage `quantize.awq`: activation-aware weight quantization (AWQ): scale up the weight columns of large inputs before
rounding, and scale down those inputs.

Lin et al. 2023 (arXiv:2306.00978). The scales are folded into norms, the value projection and the up projection, so
inference costs nothing extra; value heads shared by a query group (GQA) share their scales.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig, WeightFormatConfig


class AwqConfig(CalibratedConfig, WeightFormatConfig):
    """Config of `quantize.awq`."""

    symmetric: bool = Field(
        False, description="symmetric integers around 0; otherwise with a zero point of the same bits for each group"
    )
    apply_clip: bool = Field(
        True,
        description=("clip group ranges to minimize each group's output error, instead of using the largest weights"),
    )


def awq(config: AwqConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in compressed-tensors, GPTQ or AWQ format (`save_format`).

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import AwqMethod
    from llmworks.quantize.run import run

    return run(
        config,
        model,
        ctx,
        data,
        AwqMethod(config.num_calibration_samples, apply_clip=config.apply_clip),
        Grid(config.bits, config.group_size, symmetric=config.symmetric),
        {"method": "awq"},
        config.save_format,
    )
