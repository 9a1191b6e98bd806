"""The runs that a scaling law is fitted to: config, sizes, and the grid of runs that the data allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from pydantic import Field, ValidationError, model_validator

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError
from llmworks.model.shape import Shape
from llmworks.train.pretrain import PretrainOptimizer

MIN_RUNS = 8  # runs at least: five coefficients, and enough degrees of freedom for valid intervals


VOCAB_MULTIPLE = 64  # vocabulary is padded to a multiple of this, as in model.new


class ScalingModelSize(Config):
    """Size of a model."""

    hidden_size: int = Field(gt=0, description="hidden size")
    num_hidden_layers: int = Field(gt=0, description="number of layers")


class ScalingConfig(Config):
    """The grid of runs, their training, and the target run."""

    sizes: list[ScalingModelSize] = Field(
        [
            ScalingModelSize(hidden_size=w, num_hidden_layers=n)
            for w, n in ((32, 1), (32, 2), (64, 2), (96, 3), (128, 4))
        ],
        min_length=3,
        description="model sizes of the grid",
    )
    flops: list[float] = Field(
        [1e12, 2e12, 4e12],
        min_length=1,
        description=(
            "compute budgets in FLOPs; each size is trained with each budget, with the number of tokens that it allows"
        ),
    )
    target: ScalingModelSize = Field(
        ScalingModelSize(hidden_size=192, num_hidden_layers=6),
        description="size of the target run, which is predicted, then run",
    )
    target_flops: float = Field(1.2e13, gt=0, description="compute budget of the target run in FLOPs")
    head_dim: int = Field(32, gt=0, description="head dimension, the same for all sizes")
    shape: Shape = Field(
        Shape(),
        description=(
            "architecture of the decoder; hidden_size, num_hidden_layers, num_attention_heads and"
            " vocab_size are ignored"
        ),
    )
    batch_size: int = Field(8, gt=0, description="rows per step")
    optimizer: PretrainOptimizer = Field(
        PretrainOptimizer(name="muon", learning_rate=0.006),
        description="optimizer; its learning rate is that of `lr_base_hidden_size`",
    )
    lr_base_hidden_size: int = Field(
        128,
        ge=0,
        description=("learning rates scale with sqrt(lr_base_hidden_size / hidden_size); 0 = the same for all sizes"),
    )
    max_epochs: float = Field(
        4.0,
        gt=0,
        description=(
            "skip runs that would need more epochs: repeated data gives less (Muennighoff et al. 2023,"
            " arXiv:2305.16264)"
        ),
    )
    min_steps: int = Field(20, gt=1, description="skip runs with fewer steps")
    eval_samples: int = Field(256, ge=0, description="held-out rows for the eval loss of each run; 0 = all")
    bootstrap_iters: int = Field(200, gt=19, description="bootstrap iterations for confidence intervals")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for size in (*self.sizes, self.target):
            if size.hidden_size % self.head_dim:
                raise ValueError(f"hidden_size {size.hidden_size} is not divisible by head_dim {self.head_dim}")
            try:
                self.get_shape(size, VOCAB_MULTIPLE, VOCAB_MULTIPLE)
            except ValidationError as error:
                raise ValueError(
                    f"hidden_size {size.hidden_size}, {size.num_hidden_layers} layers: {error.errors()[0]['msg']}"
                ) from None
        if len(set(self.flops)) < len(self.flops) or len(
            {(s.hidden_size, s.num_hidden_layers) for s in self.sizes}
        ) < len(self.sizes):
            raise ValueError("sizes or flops contain duplicates; each run is one size with one compute budget")
        if self.target_flops <= max(self.flops):
            raise ValueError(
                f"target_flops {self.target_flops:g} must exceed those of the grid, at most {max(self.flops):g}"
            )
        return self

    def get_shape(self, size: ScalingModelSize, vocabulary: int, length: int) -> Shape:
        """Return the decoder shape of a size."""
        more = {
            "hidden_size": size.hidden_size,
            "num_hidden_layers": size.num_hidden_layers,
            "num_attention_heads": size.hidden_size // self.head_dim,
            "num_key_value_heads": 0,
            "head_dim": 0,
            "intermediate_size": 0,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
        }
        return Shape.model_validate(self.shape.model_dump() | more)

    def get_learning_rate(self, size: ScalingModelSize) -> float:
        """Return the learning rate of a size."""
        return self.optimizer.learning_rate * math.sqrt(
            self.lr_base_hidden_size / size.hidden_size if self.lr_base_hidden_size else 1.0
        )


@dataclass(frozen=True)
class ScalingRunPlan:
    """One planned run."""

    name: str
    size: ScalingModelSize
    shape: Shape
    steps: int
    tokens: int
    flops: float
    parameters: int


def plan_runs(
    config: ScalingConfig, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[list[ScalingRunPlan], list[tuple[str, str]]]:
    """Return the planned runs, and the skipped ones with the reason.

    Errors: UserError for fewer runs than a scaling law needs.
    """
    plans: list[ScalingRunPlan] = []
    skipped: list[tuple[str, str]] = []
    for flops in config.flops:
        for size in config.sizes:
            plan, why = plan_run(config, size, flops, vocabulary, length, tokens, rows)
            if plan is not None and any(p.shape == plan.shape and p.steps == plan.steps for p in plans):
                plan, why = None, "same number of steps as another run of this size"
            if plan is not None:
                plans.append(plan)
            else:
                skipped.append(
                    (f"hidden size {size.hidden_size}, {size.num_hidden_layers} layers, {flops:.2g} FLOPs", why)
                )
    if len(plans) < MIN_RUNS:
        first = f"; the first skipped one: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise UserError(
            f"{len(plans)} of {len(config.flops) * len(config.sizes)} runs remain, but a scaling law"
            f" needs {MIN_RUNS}{first}"
        )
    if min(len({p.parameters for p in plans}), len({p.tokens for p in plans})) < 3:
        raise UserError("the remaining runs have fewer than three sizes or token counts; add sizes or flops")
    return plans, skipped


def plan_run(
    config: ScalingConfig, size: ScalingModelSize, flops: float, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[ScalingRunPlan | None, str]:
    """Plan a run of a compute budget in FLOPs of matrix products, backward twice the forward. Or (None, why not)."""
    from llmworks.model.anatomy.parts import list_parts

    shape = config.get_shape(size, vocabulary, length)
    parts = list_parts(shape, length // 2)
    each = 3 * sum(part.flops for part in parts)
    per_step = tokens / rows * config.batch_size
    steps = round(flops / each / per_step)
    if steps < config.min_steps:
        return None, f"{steps} steps are fewer than min_steps {config.min_steps}"
    read = steps * per_step
    if read > config.max_epochs * tokens:
        return None, f"needs {read / tokens:.1f} epochs, more than max_epochs {config.max_epochs:g}"
    return (
        ScalingRunPlan(
            f"{size.hidden_size}x{size.num_hidden_layers}-{flops:.17g}",
            size,
            shape,
            steps,
            round(read),
            each * read,
            sum(part.parameters for part in parts),
        ),
        "",
    )
