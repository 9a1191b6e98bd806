"""Stage `quantize.zeroquant`: group-wise weights and token-wise activations, followed by layer-by-layer knowledge
distillation of each block.

Yao et al. 2022, ZeroQuant (arXiv:2206.01861), sections 3.1 and 3.2.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.quantize.config import CalibratedConfig


class ZeroquantConfig(CalibratedConfig):
    """Config of `quantize.zeroquant`."""

    activation_bits: int = Field(8, ge=4, le=8, description="activation bits, with dynamic per-token scales")
    num_train_epochs: int = Field(2, ge=0, description="distillation epochs per block; 0: no distillation")
    batch_size: int = Field(4, gt=0, description="sequences per training step")
    learning_rate: float = Field(
        1e-2, gt=0, description="Adam's learning rate, relative to the mean absolute weight of a matrix"
    )


def zeroquant(config: ZeroquantConfig, model: Model, ctx: Context, data: Dataset) -> Model:
    """Write a directory in compressed-tensors format.

    Errors: ModelError for a model that cannot be quantized, DataError for too little data, GoldenMismatch when the
    result computes something else.
    """
    from llmworks.model.lowbit.activations import InputQuantization
    from llmworks.model.lowbit.integer import Grid
    from llmworks.quantize.algorithms.block_distillation import BlockDistillation
    from llmworks.quantize.run import run

    method = BlockDistillation(
        config.num_calibration_samples,
        num_train_epochs=config.num_train_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=ctx.seed,
    )
    return run(
        config,
        model,
        ctx,
        data,
        method,
        Grid(config.bits, config.group_size, inputs=InputQuantization(config.activation_bits)),
        {"method": "zeroquant"},
    )
