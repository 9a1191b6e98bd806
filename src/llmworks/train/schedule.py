"""The optimizer's fields and the learning rate of every step. Torch-free, so that recipes are checked without it."""

from __future__ import annotations

import math

from pydantic import Field

from llmworks.artifact import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with warm-up and cosine decay."""

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of all steps over which the learning rate rises from zero")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm; larger gradients are scaled down")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (0-based) of `steps`: linear warm-up, then cosine to the final fraction."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    floor = config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
