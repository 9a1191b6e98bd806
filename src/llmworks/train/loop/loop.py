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
from llmworks.train.distributed.pipeline import Pipelined
from llmworks.train.distributed.sharding import Placed
from llmworks.train.distributed.world import World
from llmworks.train.loop import checkpoints
from llmworks.train.loop.early_stopping import Best
from llmworks.train.loop.loss_guard import Watch
from llmworks.train.loop.optimizers import optimizers_of
from llmworks.train.loop.schedule import OptimizerConfig, learning_rate

if TYPE_CHECKING:
    from llmworks.core.progress import Bar
    from llmworks.train.loop.checkpoints import Running


class Batch(Protocol):
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
class Habits:
    """Settings of the loop besides the optimizer.

    `evaluate(step)` runs every `eval_steps` steps and after the last one; the first process writes its result to the
    metrics.
    """

    checkpoint_every: int
    keep: int = 2
    precision: str = "fp32"  # fp32, bf16 or fp16 under autocast; master weights stay fp32
    average: float = 0.0  # EMA decay; the averaged weights are the result; 0 = off
    spike: float = 0.0
    look: Callable[[int], dict[str, float]] | None = None
    look_every: int = 0
    rate: Callable[[int], float] | None = None  # learning rate of a step, instead of the schedule
    best: Best | None = None  # the weights of the best evaluation are the result
    told: Callable[[], Mapping[str, float]] | None = None  # further metrics of a step, beside its loss
    faster: Mapping[str, float] = field(
        default_factory=dict
    )  # learning rate multiplier by the last component of the parameter name


def train(
    model: nn.Module | Placed | Pipelined,
    steps: Sequence[Sequence[Callable[[], Any]]],
    loss: Callable[[Any, Any], Tensor],
    config: OptimizerConfig,
    habits: Habits,
    *,
    scratch: Path,
    progress: Progress,
) -> dict[str, float]:
    """Run all steps; each is a list of factories of micro-batches whose gradients are accumulated.

    Each process gets its own micro-batches. Trains the parameters that require gradients. Returns metrics.

    Errors: TrainingError when the loss is not finite or spikes.
    """
    placed = Placed(model, World(next(model.parameters()).device)) if isinstance(model, nn.Module) else model
    best = habits.best
    running, world = _running(placed, config, habits), placed.world
    start = checkpoints.resume(running, scratch)
    rows = [row for row in progress.read_metrics() if row.get("step", -1) < start]
    progress.keep_metrics(rows)
    if best is not None:
        best.begin(world.agreed(rows))  # only the first process has them
    watch = Watch(habits.spike, world.agreed([row["loss"] for row in rows if "loss" in row]))
    network = placed.network
    network.train()
    with progress.bar("train", len(steps), "steps") as bar:
        bar.resume(start)
        if start:
            progress.say(f"resuming from step {start} of {len(steps)}")
        for step in range(start, len(steps)):
            _take_step(habits, step, steps, config, running, world, placed, loss, watch, progress, bar)
            last = step + 1 == len(steps)
            if habits.look is not None and (last or (habits.look_every and (step + 1) % habits.look_every == 0)):
                with averaged(running), torch.random.fork_rng(enabled=True):
                    seen = world.agreed(habits.look(step))
                    progress.metric(step=step, **seen)
                    enough = best is not None and best.heard(step, seen, placed.parameters, first=world.first)
                network.train()
                if enough:
                    progress.say(
                        f"step {step + 1}: early stopping: no improvement of {best.metric if best else ''}"
                        f" in {best.patience if best else 0} evaluations"
                    )
                    break
            if (step + 1) % habits.checkpoint_every == 0 and not last:
                checkpoints.save(running, step + 1, scratch, habits.keep)
    world.wait()
    if best is not None and best.step is not None:
        best.restore(placed.parameters)
    else:
        with torch.no_grad():
            for name, mean in running.average.items():
                running.parameters[name].copy_(mean)
    network.eval()
    return summary([row for row in progress.read_metrics() if "loss" in row])


def _take_step(
    habits: Habits,
    step: int,
    steps: Sequence[Sequence[Callable[[], Any]]],
    config: OptimizerConfig,
    running: Running,
    world: World,
    placed: Placed | Pipelined,
    loss: Callable[[Any, Any], Tensor],
    watch: Watch,
    progress: Progress,
    bar: Bar,
) -> None:
    """Run one optimizer step: forward, backward, gradient clipping, update, EMA, metrics."""
    began = time.monotonic()
    rate = habits.rate(step) if habits.rate is not None else learning_rate(step, len(steps), config)
    for group in (group for optimizer in running.optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group.get("times", 1.0)
    batches = [make() for make in steps[step]]
    loaded = time.monotonic() - began
    labels, tokens = (int(n) for n in world.total([sum(b.labels for b in batches), sum(b.tokens for b in batches)]))
    if not labels:
        raise TrainingError("batch has no trainable tokens (all labels are masked)")
    (total,) = world.total([placed.backward(batches, loss, labels, running.scaler, habits.precision)])
    for optimizer in running.optimizers:
        running.scaler.unscale_(optimizer)
    norm = placed.clip(config.max_grad_norm)
    batch = "; ".join(filter(None, (getattr(b, "where", "") for b in batches)))
    watch.look(
        step,
        len(steps),
        total,
        norm,
        batch + (f"; and the batches of {world.size - 1} other processes" if world.size > 1 else ""),
        scaled=habits.precision == "fp16",
    )
    for optimizer in running.optimizers:
        running.scaler.step(optimizer)
        optimizer.zero_grad()
    running.scaler.update()
    for name, mean in running.average.items():
        mean.lerp_(
            running.parameters[name].detach(), 1 - min(habits.average, (1 + step) / (10 + step))
        )  # warm-up: the initial weights are soon forgotten
    seconds = time.monotonic() - began
    progress.metric(
        step=step,
        loss=total,
        learning_rate=rate,
        grad_norm=norm,
        tokens=tokens,
        num_label_tokens=labels,
        seconds=seconds,
        loading=loaded,
        memory=memory(world.device),
        **(habits.told() if habits.told is not None else {}),
    )
    bar.advance(1, loss=total, tokens_per_s=tokens / seconds)


def _running(placed: Placed | Pipelined, config: OptimizerConfig, habits: Habits) -> checkpoints.Running:
    if not placed.parameters:
        raise TrainingError("the model has no trainable parameters")
    average = {name: p.detach().clone() for name, p in placed.parameters.items()} if habits.average else {}
    scaler = torch.amp.GradScaler(placed.world.device.type, enabled=habits.precision == "fp16")
    return checkpoints.Running(
        placed.parameters, optimizers_of(placed.network, config, habits.faster), average, scaler, placed.world
    )


@contextlib.contextmanager
def averaged(running: checkpoints.Running) -> Iterator[None]:
    """Swap in the EMA weights, if there are any, for the duration of the context."""
    own = {name: running.parameters[name].detach().clone() for name in running.average}
    with torch.no_grad():
        for name, mean in running.average.items():
            running.parameters[name].copy_(mean)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                running.parameters[name].copy_(weight)


def memory(device: torch.device) -> int:
    """Return peak memory in bytes: of the GPU when training runs on one, else of this process (RSS)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Summarize a finished training: mean loss of the first and last tenth, tokens, seconds, tokens per second."""
    tenth = max(1, len(rows) // 10)
    tokens, seconds = sum(r["tokens"] for r in rows), sum(r["seconds"] for r in rows)
    return {
        "steps": len(rows),
        "loss_first": sum(r["loss"] for r in rows[:tenth]) / tenth,
        "loss": sum(r["loss"] for r in rows[-tenth:]) / tenth,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
    }
