"""Stage `train.lr_finder`: find a learning rate for a fine-tuning with a learning rate range test.

A short run with an exponentially rising learning rate (Smith 2015, arXiv:1506.01186, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, TrainingError
from llmworks.train.finetune.run import prepare_trainable
from llmworks.train.sft import SftConfig, tokenize_data

if TYPE_CHECKING:
    from llmworks.train.finetune.method import TrainingData
    from llmworks.train.finetune.trainable import TrainableModel

SMOOTHING, DIVERGENCE_FACTOR = 0.8, 2.0  # EMA decay of the smoothed loss; multiple of its minimum that ends the run


class LrFinderConfig(Config):
    """The fine-tuning and the range of learning rates."""

    training: SftConfig = Field(
        SftConfig(),
        description=(
            "the fine-tuning to find a learning rate for; its own learning rate, schedule and length are ignored"
        ),
        json_schema_extra={"fields_of": "train.sft"},
    )
    min_lr: float = Field(1e-6, gt=0, description="lowest learning rate, of the first step")
    max_lr: float = Field(
        1.0, gt=0, description="highest learning rate, of the last step unless the loss diverges before"
    )
    num_steps: int = Field(60, ge=20, description="number of steps")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_lr * 10 > self.max_lr:
            raise ValueError(
                f"min_lr {self.min_lr:g} and max_lr {self.max_lr:g} are too close; they must differ by a factor"
                " of at least 10"
            )
        return self


def lr_finder(config: LrFinderConfig, model: Model, data: Dataset, ctx: Context) -> Report:
    """Run the range test and suggest a learning rate.

    The suggestion is a tenth of the rate with the lowest smoothed loss, but not more than the rate where the smoothed
    loss falls fastest. Metrics: learning_rate, lr_steepest, lr_lowest_loss.

    Errors: as train.sft; DataError for less data than two steps; TrainingError if the first steps already diverge.
    """
    import torch

    from llmworks.train.distributed.sharding import resolve_precision
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.loop import LoopConfig, train

    training = config.training
    material = tokenize_data(training, model, data, None)
    each = training.batch_size * training.gradient_accumulation_steps
    if len(material.examples) < 2 * each:
        raise DataError(
            f"{data.name}: has {len(material.examples)} rows to train on, a step needs {each}; at least two steps"
            " are needed"
        )
    tuned = open_trainable_model(model.path)
    torch.manual_seed(ctx.seed)
    prepare_trainable(tuned, training)
    loss, steps = _create_steps_and_loss(material, config, each, training, ctx, tuned)
    rising: list[float] = [
        config.min_lr * (config.max_lr / config.min_lr) ** (i / (config.num_steps - 1)) for i in range(config.num_steps)
    ]

    def rate(step: int) -> float:
        seen = [row["loss"] for row in ctx.progress.read_metrics()]
        if len(seen) > 10 and smooth_losses(seen)[-1] > DIVERGENCE_FACTOR * min(smooth_losses(seen)):
            raise _Diverged
        return rising[step]

    try:
        train(
            tuned.network,
            steps,
            loss,
            training.optimizer,
            LoopConfig(
                10**9,
                precision=resolve_precision(training.precision, torch.device("cpu")),
                lr_at_step=rate,
                lr_multipliers={"b": training.lora.loraplus_lr_ratio} if training.lora.loraplus_lr_ratio > 1 else {},
            ),
            scratch=ctx.scratch,
            progress=ctx.progress,
        )
    except _Diverged:
        pass
    except TrainingError as error:  # a non-finite loss ends the range test, too
        ctx.progress.log(str(error))
    return _describe(ctx, rising, model, data)


def _create_steps_and_loss(
    training_data: TrainingData,
    config: LrFinderConfig,
    each: int,
    training: SftConfig,
    ctx: Context,
    trainable: TrainableModel,
) -> tuple[Any, Sequence[list[Callable[[], Any]]]]:
    """Create the loss and enough steps for the range test."""
    from llmworks.train.finetune.examples import ExampleSteps
    from llmworks.train.loop.losses import NeftuneNoise, next_token_loss
    from llmworks.train.loop.packed_steps import packed_loss

    steps = ExampleSteps(
        training_data.examples,
        epochs=math.ceil(config.num_steps * each / len(training_data.examples)) + 1,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        seed=ctx.seed,
        padding_free=trainable.padding_free,
    )[: config.num_steps]
    loss: Any = packed_loss if trainable.padding_free else next_token_loss
    if training.neftune_noise_alpha:
        loss = NeftuneNoise(trainable.network, training.neftune_noise_alpha).wrap_loss(loss)
    return loss, steps


def _describe(ctx: Context, learning_rates: list[float], model: Model, data: Dataset) -> Report:
    """Write the report and the suggested rate. TrainingError if the first steps already diverge."""
    losses = [row["loss"] for row in ctx.progress.read_metrics()]
    if len(losses) < 10:
        raise TrainingError(
            f"the loss diverged after {len(losses)} steps, at a learning rate of {learning_rates[len(losses)]:.1e};"
            " lower"
            " min_lr"
        )
    best, steepest, at_lowest = choose_learning_rate(learning_rates, losses)
    metrics: dict[str, Any] = {
        "learning_rate": float(f"{best:.2g}"),
        "lr_steepest": float(f"{steepest:.2g}"),
        "lr_lowest_loss": float(f"{at_lowest:.2g}"),
        "steps": len(losses),
    }
    page = ctx.report
    page.title = f"Learning rate range test of {model.name} on {data.name}"
    page.subtitle = (
        f"Suggested learning rate: {best:.1e}. The smoothed loss falls fastest at {steepest:.1e} and is lowest"
        f" at {at_lowest:.1e}; tested up to {learning_rates[len(losses) - 1]:.1e}."
    )
    logs = [math.log10(r) for r in learning_rates]
    page.add_curves(
        "Loss",
        {
            "loss": list(zip(logs, losses, strict=False)),
            "smoothed": list(zip(logs, smooth_losses(losses), strict=False)),
        },
        x="log10 of the learning rate",
        y="nats per label token",
    )
    page.add_table("Metrics", ("metric", "value"), list(metrics.items()))
    page.data = {"rates": learning_rates[: len(losses)], "losses": losses, "metrics": metrics}
    return Report(ctx.out, metrics=metrics)


class _Diverged(Exception):
    """Signal that the loss has diverged and larger rates need not be tried."""


def smooth_losses(losses: Sequence[float]) -> list[float]:
    """Compute the bias-corrected exponential moving average of the losses."""
    out, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        out.append(mean / (1 - SMOOTHING**step))
    return out


def choose_learning_rate(learning_rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """Return (suggested rate, rate of the steepest descent, rate of the lowest smoothed loss).

    The descent is measured over the logarithm of the rate.
    """
    smoothed_losses = smooth_losses(losses)
    low = min(range(len(smoothed_losses)), key=smoothed_losses.__getitem__)
    falls = [
        (smoothed_losses[i + 2] - smoothed_losses[i - 2])
        for i in range(2, max(3, min(low, len(smoothed_losses) - 3)) + 1)
        if i + 2 < len(smoothed_losses)
    ]
    steep = 2 + min(range(len(falls)), key=falls.__getitem__) if falls else low
    return (
        min(learning_rates[low] / 10, learning_rates[steep]) if steep < low else learning_rates[low] / 10,
        learning_rates[min(steep, low)],
        learning_rates[low],
    )
