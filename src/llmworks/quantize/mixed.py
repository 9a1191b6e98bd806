"""Stage `quantize.mixed`: whole numbers of more bits where a model bears least to lose them, so many on average;
rounded by GPTQ.

In the manner of EXL2 (turboderp, exllamav2): what each part would cost at each number of bits is found first, then bits
are given within the budget. The cost is what the divergence of the model would be, to second order.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.algorithms.config import MixedConfig


def mixed(config: MixedConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in the form of compressed-tensors.

    Errors: ModelError for a model that cannot be quantized, DataError for too little text, GoldenMismatch when the
    result computes something else; ModelError for a budget below the fewest bits.
    """
    from llmworks.quantize.algorithms.bit_allocation import run

    return run(config, model, ctx, data)
