"""Which trainings a scaling law is fitted to: fields, sizes, and the grid that fits the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, ValidationError, model_validator

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError
from llmworks.model.shape import Shape
from llmworks.train.pretrain import PretrainOptimizer

if TYPE_CHECKING:
    pass


LEAST = 8  # runs: five coefficients, and enough left over for intervals that hold what they should


ROUND = 64  # rows of an embedding, as model.new has them


class Size(Config):
    """What sizes differ in."""

    hidden_size: int = Field(gt=0, description="numbers of a token's state")
    num_hidden_layers: int = Field(gt=0, description="blocks")


class ScalingConfig(Config):
    """The grid of runs, how each is trained, and the run that is predicted."""

    sizes: list[Size] = Field(
        [Size(hidden_size=w, num_hidden_layers=n) for w, n in ((32, 1), (32, 2), (64, 2), (96, 3), (128, 4))],
        min_length=3,
        description="sizes of the grid",
    )
    flops: list[float] = Field(
        [1e12, 2e12, 4e12],
        min_length=1,
        description="operations of a run; each size is run with each, with as many tokens as that is",
    )
    target: Size = Field(Size(hidden_size=192, num_hidden_layers=6), description="the size that is predicted, then run")
    target_flops: float = Field(1.2e13, gt=0, description="operations of the run that is predicted")
    head_dim: int = Field(32, gt=0, description="numbers of a head, in each size")
    shape: Shape = Field(
        Shape(), description="all other switches of the decoder; width, layers, heads and vocabulary are not read"
    )
    batch_size: int = Field(8, gt=0, description="rows of a step")
    optimizer: PretrainOptimizer = Field(
        PretrainOptimizer(name="muon", learning_rate=0.006),
        description="optimizer; its learning rate is that of `rate_width`",
    )
    lr_base_hidden_size: int = Field(
        128, ge=0, description="learning rates of other widths are by the root of this over theirs; 0: the same for all"
    )
    max_epochs: float = Field(
        4.0,
        gt=0,
        description=(
            "runs that would read the data more often are left out: what is read again teaches less (Muennighoff et al."
            " 2023, arXiv:2305.16264)"
        ),
    )
    min_steps: int = Field(20, gt=1, description="runs of fewer steps are left out")
    eval_samples: int = Field(256, ge=0, description="rows of held-out tokens that each run is measured on; 0: all")
    bootstrap_iters: int = Field(200, gt=19, description="times that runs are drawn again for intervals")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for size in (*self.sizes, self.target):
            if size.hidden_size % self.head_dim:
                raise ValueError(f"width {size.hidden_size} is not divided by head_width {self.head_dim}")
            try:
                self.shape_of(size, ROUND, ROUND)
            except ValidationError as error:
                raise ValueError(
                    f"width {size.hidden_size}, {size.num_hidden_layers} layers: {error.errors()[0]['msg']}"
                ) from None
        if len(set(self.flops)) < len(self.flops) or len(
            {(s.hidden_size, s.num_hidden_layers) for s in self.sizes}
        ) < len(self.sizes):
            raise ValueError("sizes or flops hold one value twice; each run is one size with one amount of work")
        if self.target_flops <= max(self.flops):
            raise ValueError(
                f"target_flops {self.target_flops:g} is not more than those of the grid, {max(self.flops):g}"
            )
        return self

    def shape_of(self, size: Size, vocabulary: int, length: int) -> Shape:
        """The decoder of a size."""
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

    def rate_of(self, size: Size) -> float:
        """The learning rate of a size."""
        return self.optimizer.learning_rate * math.sqrt(
            self.lr_base_hidden_size / size.hidden_size if self.lr_base_hidden_size else 1.0
        )


@dataclass(frozen=True)
class Plan:
    """One run that is to be made."""

    name: str
    size: Size
    shape: Shape
    steps: int
    tokens: int
    work: float
    parameters: int


def grid(
    config: ScalingConfig, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[list[Plan], list[tuple[str, str]]]:
    """The runs that are made, and those that are left out, with the reason.

    Errors: UserError for fewer than a law needs.
    """
    plans: list[Plan] = []
    left_out: list[tuple[str, str]] = []
    for flops in config.flops:
        for size in config.sizes:
            plan, why = planned(config, size, flops, vocabulary, length, tokens, rows)
            if plan is not None and any(p.shape == plan.shape and p.steps == plan.steps for p in plans):
                plan, why = None, "as many steps as another run of this size"
            if plan is not None:
                plans.append(plan)
            else:
                left_out.append(
                    (f"width {size.hidden_size}, {size.num_hidden_layers} layers, {flops:.2g} operations", why)
                )
    if len(plans) < LEAST:
        first = f"; the first that is not: {left_out[0][0]} ({left_out[0][1]})" if left_out else ""
        raise UserError(
            f"{len(plans)} runs of {len(config.flops) * len(config.sizes)} are left, a law needs {LEAST}{first}"
        )
    if min(len({p.parameters for p in plans}), len({p.tokens for p in plans})) < 3:
        raise UserError(
            "the runs that are left have fewer than three sizes, or amounts of tokens; give more sizes or more flops"
        )
    return plans, left_out


def planned(
    config: ScalingConfig, size: Size, flops: float, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[Plan | None, str]:
    """A run of so many operations: forward and twice that backward, of matrix products. Or None, and why not."""
    from llmworks.model.anatomy.parts import parts_of

    shape = config.shape_of(size, vocabulary, length)
    parts = parts_of(shape, length // 2)
    each = 3 * sum(part.work for part in parts)
    per_step = tokens / rows * config.batch_size
    steps = round(flops / each / per_step)
    if steps < config.min_steps:
        return None, f"{steps} steps are fewer than least_steps {config.min_steps}"
    read = steps * per_step
    if read > config.max_epochs * tokens:
        return None, f"reads the data {read / tokens:.1f} times, more than passes {config.max_epochs:g}"
    return (
        Plan(
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
