"""Stage `quantize.mixed`: mixed-precision integers by sensitivity, within an average bit budget; rounded by GPTQ.

Like EXL2 (turboderp, exllamav2): first estimate the cost of each part at each bit width, then allocate bits within the
budget. The cost is a second-order estimate of the model's KL divergence.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.algorithms.config import MixedConfig


def mixed(config: MixedConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in compressed-tensors format.

    Errors: ModelError for a model that cannot be quantized, or a budget below the fewest bits; DataError for too little
    data; GoldenMismatch when the result computes something else.
    """
    from llmworks.quantize.algorithms.bit_allocation import run

    return run(config, model, ctx, data)
