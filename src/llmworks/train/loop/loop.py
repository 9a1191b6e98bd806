"""The training loop, shared by all methods, which differ in a sequence of batches and a loss function.

Gradient accumulation: the loss of a step is normalized by the label tokens of all its micro-batches. Checkpoints hold
everything that decides the next step, so that a resumed run equals the uninterrupted run bit for bit.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmworks.core.errors import TrainingError
from llmworks.core.progress import Progress
from llmworks.train.distributed.pipeline import PipelinedModel
from llmworks.train.distributed.sharding import DistributedModel
from llmworks.train.distributed.world import World
from llmworks.train.loop import checkpoints
from llmworks.train.loop.early_stopping import EarlyStopping
from llmworks.train.loop.loss_guard import LossGuard
from llmworks.train.loop.optimizers import create_optimizers
from llmworks.train.loop.schedule import OptimizerConfig, learning_rate

if TYPE_CHECKING:
    from llmworks.core.progress import ProgressBar
    from llmworks.train.loop.checkpoints import TrainingState


class MicroBatch(Protocol):
    """What the loop needs of a micro-batch."""

    @property
    def labels(self) -> int:
        """Number of label tokens."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop besides the optimizer.

    `evaluate(step)` runs every `eval_steps` steps and after the last one; the first process writes its result to the
    metrics.
    """

    save_steps: int
    save_total_limit: int = 2
    precision: str = "fp32"  # fp32, bf16 or fp16 under autocast; master weights stay fp32
    ema_decay: float = 0.0  # EMA decay; the averaged weights are the result; 0 = off
    loss_spike_threshold: float = 0.0
    evaluate: Callable[[int], dict[str, float]] | None = None
    eval_steps: int = 0
    lr_at_step: Callable[[int], float] | None = None  # learning rate of a step, instead of the schedule
    early_stopping: EarlyStopping | None = None  # the weights of the best evaluation are the result
    step_metrics: Callable[[], Mapping[str, float]] | None = None  # further metrics of a step, beside its loss
    lr_multipliers: Mapping[str, float] = field(
        default_factory=dict
    )  # learning rate multiplier by the last component of the parameter name


def train(
    model: nn.Module | DistributedModel | PipelinedModel,
    steps: Sequence[Sequence[Callable[[], Any]]],
    loss: Callable[[Any, Any], Tensor],
    config: OptimizerConfig,
    loop_config: LoopConfig,
    *,
    scratch: Path,
    progress: Progress,
) -> dict[str, float]:
    """Run all steps; each is a list of factories of micro-batches whose gradients are accumulated.

    Each process gets its own micro-batches. Trains the parameters that require gradients. Returns metrics.
    Errors: TrainingError when the loss is not finite or spikes.
    """
    distributed = (
        DistributedModel(model, World(next(model.parameters()).device)) if isinstance(model, nn.Module) else model
    )
    early_stopping = loop_config.early_stopping
    state, world = _create_state(distributed, config, loop_config), distributed.world
    start = checkpoints.resume(state, scratch)
    rows = [row for row in progress.read_metrics() if row.get("step", -1) < start]
    progress.rewrite_metrics(rows)
    if early_stopping is not None:
        early_stopping.restore_state(world.broadcast(rows))  # only the first process has them
    losses = world.broadcast([row["loss"] for row in rows if "loss" in row])
    loss_guard = LossGuard(loop_config.loss_spike_threshold, losses)
    network = distributed.network
    network.train()
    with progress.bar("train", len(steps), "steps") as bar:
        bar.resume(start)
        if start:
            progress.log(f"resuming from step {start} of {len(steps)}")
        for step in range(start, len(steps)):
            _take_step(loop_config, step, steps, config, state, world, distributed, loss, loss_guard, progress, bar)
            last = step + 1 == len(steps)
            due = last or (loop_config.eval_steps and (step + 1) % loop_config.eval_steps == 0)
            if loop_config.evaluate is not None and due:
                with use_ema_weights(state), torch.random.fork_rng(enabled=True):
                    metrics = world.broadcast(loop_config.evaluate(step))
                    progress.log_metrics(step=step, **metrics)
                    should_stop = early_stopping is not None and early_stopping.update(
                        step, metrics, distributed.parameters, is_main=world.is_main
                    )
                network.train()
                if should_stop and early_stopping is not None:
                    better = f"no improvement of {early_stopping.metric} in {early_stopping.patience} evaluations"
                    progress.log(f"step {step + 1}: early stopping: {better}")
                    break
            if (step + 1) % loop_config.save_steps == 0 and not last:
                checkpoints.save(state, step + 1, scratch, loop_config.save_total_limit)
    world.barrier()
    if early_stopping is not None and early_stopping.best_step is not None:
        early_stopping.load_best_weights(distributed.parameters)
    else:
        with torch.no_grad():
            for name, mean in state.ema.items():
                state.parameters[name].copy_(mean)
    network.eval()
    return summarize([row for row in progress.read_metrics() if "loss" in row])


def _take_step(
    loop_config: LoopConfig,
    step: int,
    steps: Sequence[Sequence[Callable[[], Any]]],
    config: OptimizerConfig,
    state: TrainingState,
    world: World,
    distributed: DistributedModel | PipelinedModel,
    loss: Callable[[Any, Any], Tensor],
    loss_guard: LossGuard,
    progress: Progress,
    bar: ProgressBar,
) -> None:
    """Run one optimizer step: forward, backward, gradient clipping, update, EMA, metrics."""
    began = time.monotonic()
    scheduled = loop_config.lr_at_step
    rate = scheduled(step) if scheduled is not None else learning_rate(step, len(steps), config)
    for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group.get("times", 1.0)
    batches = [make() for make in steps[step]]
    loaded = time.monotonic() - began
    sums = [sum(b.labels for b in batches), sum(b.tokens for b in batches)]
    labels, tokens = (int(n) for n in world.sum_over_axis(sums))
    if not labels:
        raise TrainingError("batch has no trainable tokens (all labels are masked)")
    (total,) = world.sum_over_axis([distributed.backward(batches, loss, labels, state.scaler, loop_config.precision)])
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = distributed.clip_gradients(config.max_grad_norm)
    batch = "; ".join(filter(None, (getattr(b, "where", "") for b in batches)))
    loss_guard.check(
        step,
        len(steps),
        total,
        norm,
        batch + (f"; and the batches of {world.size - 1} other processes" if world.size > 1 else ""),
        scaled=loop_config.precision == "fp16",
    )
    for optimizer in state.optimizers:
        state.scaler.step(optimizer)
        optimizer.zero_grad()
    state.scaler.update()
    for name, mean in state.ema.items():
        mean.lerp_(
            state.parameters[name].detach(), 1 - min(loop_config.ema_decay, (1 + step) / (10 + step))
        )  # warm-up: the initial weights are soon forgotten
    seconds = time.monotonic() - began
    progress.log_metrics(
        step=step,
        loss=total,
        learning_rate=rate,
        grad_norm=norm,
        tokens=tokens,
        num_label_tokens=labels,
        seconds=seconds,
        data_seconds=loaded,
        peak_memory=peak_memory(world.device),
        **(loop_config.step_metrics() if loop_config.step_metrics is not None else {}),
    )
    bar.advance(1, loss=total, tokens_per_s=tokens / seconds)


def _create_state(
    distributed: DistributedModel | PipelinedModel, config: OptimizerConfig, loop_config: LoopConfig
) -> checkpoints.TrainingState:
    if not distributed.parameters:
        raise TrainingError("the model has no trainable parameters")
    ema = {name: p.detach().clone() for name, p in distributed.parameters.items()} if loop_config.ema_decay else {}
    scaler = torch.amp.GradScaler(distributed.world.device.type, enabled=loop_config.precision == "fp16")
    return checkpoints.TrainingState(
        distributed.parameters,
        create_optimizers(distributed.network, config, loop_config.lr_multipliers),
        ema,
        scaler,
        distributed.world,
    )


@contextlib.contextmanager
def use_ema_weights(state: checkpoints.TrainingState) -> Iterator[None]:
    """Swap in the EMA weights, if there are any, for the duration of the context."""
    own = {name: state.parameters[name].detach().clone() for name in state.ema}
    with torch.no_grad():
        for name, mean in state.ema.items():
            state.parameters[name].copy_(mean)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                state.parameters[name].copy_(weight)


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: of the GPU when training runs on one, else of this process (RSS)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Summarize a finished training: mean loss of the first and last tenth, tokens, seconds, tokens per second."""
    tenth = max(1, len(rows) // 10)
    tokens, seconds = sum(r["tokens"] for r in rows), sum(r["seconds"] for r in rows)
    return {
        "steps": len(rows),
        "initial_loss": sum(r["loss"] for r in rows[:tenth]) / tenth,
        "loss": sum(r["loss"] for r in rows[-tenth:]) / tenth,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
    }
