"""Stage `quantize.gptq`: weights as whole numbers, column by column; each column makes up for the errors of those
before it, as the layer's inputs on `data` have it.

Frantar et al. 2022 (arXiv:2210.17323). Each layer is calibrated on what the layers before it, quantized already, give
it.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig, WholeConfig


class GptqConfig(CalibratedConfig, WholeConfig):
    """How columns are rounded."""

    symmetric: bool = Field(
        True, description="whole numbers around 0; else with a zero point, of the same bits, for each group"
    )
    dampening_frac: float = Field(
        0.01, gt=0, lt=1, description="share of the mean second moment of inputs that is added to all of them"
    )
    act_order: bool = Field(
        True,
        description=(
            "columns with the largest inputs first (act-order), scales by the weights as they are, so that no g_idx is"
            " needed"
        ),
    )
    mse_scales: bool = Field(
        True,
        description=(
            "scales by which a group's part of the outputs changes least, in place of those of the largest weights"
        ),
    )
    awq_scaling: bool = Field(False, description="columns that read large inputs made larger before, as AWQ does")


def gptq(config: GptqConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in the form of compressed-tensors.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else, ModelError for inputs whose moments cannot be inverted.
    """
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.calibrated import Gptq
    from llmworks.quantize.run import run

    method = Gptq(
        config.num_calibration_samples,
        damping=config.dampening_frac,
        by_activation=config.act_order,
        search=config.mse_scales,
        scale=config.awq_scaling,
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
