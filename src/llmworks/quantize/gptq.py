"""Stage `quantize.gptq`: GPTQ: round weights to integers column by column, each column compensating the errors of those
before it, by the second moments of the layer's inputs on `data`.

Frantar et al. 2022 (arXiv:2210.17323). Each layer is calibrated on the outputs of the already quantized layers before
it.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig, WeightFormatConfig


class GptqConfig(CalibratedConfig, WeightFormatConfig):
    """Config of `quantize.gptq`."""

    symmetric: bool = Field(
        True, description="symmetric integers around 0; otherwise with a zero point of the same bits for each group"
    )
    dampening_frac: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="dampening: fraction of the mean of the Hessian's diagonal that is added to the diagonal",
    )
    act_order: bool = Field(
        True,
        description=(
            "act-order: quantize columns with the largest inputs first; scales are those of the original column"
            " groups, so no g_idx is needed"
        ),
    )
    mse_scales: bool = Field(
        True,
        description=("choose scales that minimize each group's output error, instead of using the largest weights"),
    )
    awq_scaling: bool = Field(False, description="scale up the columns of large inputs before, as AWQ does")


def gptq(config: GptqConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in compressed-tensors, GPTQ or AWQ format (`save_format`).

    Errors: ModelError for a model that cannot be quantized or whose Hessian cannot be inverted, DataError for too
    little data, GoldenMismatch when the result computes something else.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import GptqMethod
    from llmworks.quantize.run import run

    method = GptqMethod(
        config.num_calibration_samples,
        dampening_frac=config.dampening_frac,
        act_order=config.act_order,
        mse_scales=config.mse_scales,
        awq_scaling=config.awq_scaling,
    )
    return run(
        config,
        model,
        ctx,
        data,
        method,
        Grid(config.bits, config.group_size, symmetric=config.symmetric),
        {"method": "gptq"},
        config.save_format,
    )
