"""Optimizer fields and learning rate schedule. Torch-free, so that recipes are checked without torch."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class OptimizerConfig(Config):
    """The optimizer and the learning rate schedule."""

    name: Literal["adamw", "lion", "muon", "adamw_8bit"] = Field(
        "adamw",
        description=(
            "adamw (Loshchilov & Hutter 2019); lion: sign of the momentum, wants a 3 to 10 times smaller learning"
            " rate (Chen et al. 2023); muon: orthogonalized updates of matrices, adamw for the rest (Jordan et al."
            " 2024); adamw_8bit: 8-bit optimizer states (bitsandbytes, GPU only)"
        ),
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine",
        description=(
            "learning rate schedule after warm-up: cosine or linear decay to min_lr_ratio; wsd:"
            " warmup-stable-decay, constant, then linear decay in the last part (Hu et al. 2024); constant"
        ),
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate as a fraction of the peak")
    warmup_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="fraction of all steps with linear warm-up to the peak rate",
    )
    decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd: fraction of all steps in the decay phase")
    beta1: float = Field(
        0.9, ge=0, lt=1, description="decay of the first moment; muon: of the parameters that adamw trains"
    )
    beta2: float = Field(
        0.999, ge=0, lt=1, description="decay of the second moment; lion: of the momentum, 0.99 is usual"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay of matrices; vectors such as biases and norm weights have none"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="maximum gradient norm for gradient clipping")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr_scheduler_type == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} plus decay_ratio {self.decay_ratio} exceeds 1")
        return self


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (0-based) of `steps`: linear warm-up, then decay to the minimum."""
    warmup_steps = max(1, round(config.warmup_ratio * steps))
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    floor = config.min_lr_ratio
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "wsd":
        begin = max(warmup_steps, steps - max(1, round(config.decay_ratio * steps)))
        left = 1 - max(0, step - begin) / max(1, steps - begin)
        return config.learning_rate * (floor + (1 - floor) * left)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    left = 1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (floor + (1 - floor) * left)
