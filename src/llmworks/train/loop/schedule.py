"""The optimizer's fields and the learning rate of every step. Torch-free, so that recipes are checked without it."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class OptimizerConfig(Config):
    """How weights follow their gradients, and how fast over time."""

    name: Literal["adamw", "lion", "muon", "adamw-8bit"] = Field(
        "adamw",
        description=(
            "adamw (Loshchilov & Hutter 2019); lion: the sign of the momentum, wants a learning rate 3 to 10 times"
            " smaller (Chen et al. 2023); muon: orthogonal steps of matrices, adamw for the rest (Jordan et al. 2024);"
            " adamw-8bit: moments in 8 bits, by bitsandbytes, on a GPU"
        ),
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine",
        description=(
            "after warm-up: cosine or linear to the final fraction; wsd: constant, then linear in the last part (Hu et"
            " al. 2024); constant"
        ),
    )
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    warmup: float = Field(
        0.05, ge=0, lt=1, description="fraction of all steps over which the learning rate rises from zero"
    )
    decay: float = Field(0.2, gt=0, le=1, description="wsd: fraction of all steps over which it falls")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment; muon: of the momentum of the rest")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="decay of the second moment; lion: of the momentum, 0.99 is usual"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay of matrices; vectors, as gains and biases, have none"
    )
    clip: float = Field(1.0, gt=0, description="largest gradient norm; larger gradients are scaled down")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than all steps")
        return self


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (0-based) of `steps`: linear warm-up, then by the schedule down to the final
    fraction.
    """
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    floor = config.final_fraction
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        begin = max(warm, steps - max(1, round(config.decay * steps)))
        left = 1 - max(0, step - begin) / max(1, steps - begin)
        return config.learning_rate * (floor + (1 - floor) * left)
    progress = (step - warm) / max(1, steps - warm)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (floor + (1 - floor) * left)
