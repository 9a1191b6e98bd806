"""The one training loop. What differs between methods is a list of batches and a loss function.

An accumulated batch is one batch: its loss is normalised by the label tokens of all its parts. Checkpoints hold
everything that decides the next step, so that a resumed run is the uninterrupted run, bit for bit.
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
    """What the loop asks of a part of a step."""

    @property
    def labels(self) -> int:
        """Tokens that are learned."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding left out."""
        ...


@dataclass(frozen=True)
class Habits:
    """How the loop runs, beside what it optimizes.

    `look(step)` is asked every `look_every` steps and after the last; what the first process sees is written to the
    metrics.
    """

    checkpoint_every: int
    keep: int = 2
    precision: str = "fp32"  # or bf16, fp16: of products under autocast; weights stay fp32
    average: float = 0.0  # decay of a running mean of the weights, which are what is left at the end; 0: none
    spike: float = 0.0
    look: Callable[[int], dict[str, float]] | None = None
    look_every: int = 0
    rate: Callable[[int], float] | None = None  # of a step, in place of the schedule's
    best: Best | None = None  # which look is the best; its weights are what is left at the end
    told: Callable[[], Mapping[str, float]] | None = (
        None  # what the loss says of a step beside its value, for the metrics
    )
    faster: Mapping[str, float] = field(
        default_factory=dict
    )  # by the last name of a parameter, how many times the learning rate it has


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
    """Run all steps; each is a list of parts (batches, made when needed) whose gradients are accumulated.

    Of several processes each is given its own parts.

    Trains the parameters that require gradients. Returns metrics. Errors: TrainingError when the loss is not finite, or
    jumps.
    """
    placed = Placed(model, World(next(model.parameters()).device)) if isinstance(model, nn.Module) else model
    best = habits.best
    running, world = _running(placed, config, habits), placed.world
    start = checkpoints.resume(running, scratch)
    rows = [row for row in progress.read_metrics() if row.get("step", -1) < start]
    progress.keep_metrics(rows)
    if best is not None:
        best.begin(world.agreed(rows))  # which the first process has
    watch = Watch(habits.spike, world.agreed([row["loss"] for row in rows if "loss" in row]))
    network = placed.network
    network.train()
    with progress.bar("train", len(steps), "steps") as bar:
        bar.resume(start)
        if start:
            progress.say(f"going on from step {start} of {len(steps)}")
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
                        f"step {step + 1}: {best.metric if best else ''} has not been better for"
                        f" {best.patience if best else 0} looks; this is enough"
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
    """One step: forward and backward over its parts, clip, update, average, and note its figures."""
    began = time.monotonic()
    rate = habits.rate(step) if habits.rate is not None else learning_rate(step, len(steps), config)
    for group in (group for optimizer in running.optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group.get("times", 1.0)
    batches = [make() for make in steps[step]]
    loaded = time.monotonic() - began
    labels, tokens = (int(n) for n in world.total([sum(b.labels for b in batches), sum(b.tokens for b in batches)]))
    if not labels:
        raise TrainingError("a step has no label: no token of its batches is learned")
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
        batch + (f"; and those of {world.size - 1} other processes" if world.size > 1 else ""),
        scaled=habits.precision == "fp16",
    )
    for optimizer in running.optimizers:
        running.scaler.step(optimizer)
        optimizer.zero_grad()
    running.scaler.update()
    for name, mean in running.average.items():
        mean.lerp_(
            running.parameters[name].detach(), 1 - min(habits.average, (1 + step) / (10 + step))
        )  # the untrained weights are soon forgotten
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
        raise TrainingError("no parameter of the model is trained")
    average = {name: p.detach().clone() for name, p in placed.parameters.items()} if habits.average else {}
    scaler = torch.amp.GradScaler(placed.world.device.type, enabled=habits.precision == "fp16")
    return checkpoints.Running(
        placed.parameters, optimizers_of(placed.network, config, habits.faster), average, scaler, placed.world
    )


@contextlib.contextmanager
def averaged(running: checkpoints.Running) -> Iterator[None]:
    """The averaged weights, where there are some, for as long as this lasts."""
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
    """The most memory that was held so far, in bytes: of the GPU where training runs on one, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a finished training: mean loss of the first and last tenth, tokens, seconds, tokens per second."""
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
