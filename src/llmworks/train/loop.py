"""The one training loop. What differs between methods is a list of batches and a loss function.

An accumulated batch is one batch: its loss is normalised by the label tokens of all its parts. Checkpoints hold everything that
decides the next step, so that a resumed run is the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.errors import TrainingError
from llmworks.progress import Progress
from llmworks.train.examples import Batch
from llmworks.train.schedule import OptimizerConfig, learning_rate

CHECKPOINT = "checkpoint.pt"


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Callable[[], Batch]]],
    loss: Callable[[Any, Batch], Tensor],
    config: OptimizerConfig,
    *,
    scratch: Path,
    progress: Progress,
    checkpoint_every: int,
) -> dict[str, float]:
    """Run all steps; each is a list of parts (batches, made when needed) whose gradients are accumulated.

    Trains the parameters that require gradients. Returns metrics. Errors: TrainingError when the loss is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    start = resume(parameters, optimizer, scratch)
    progress.keep_metrics([row for row in progress.read_metrics() if row.get("step", -1) < start])
    model.train()
    with progress.bar("train", len(steps), "steps") as bar:
        bar.resume(start)
        if start:
            progress.say(f"going on from step {start} of {len(steps)}")
        for step in range(start, len(steps)):
            began = time.monotonic()
            rate = learning_rate(step, len(steps), config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = [make() for make in steps[step]]
            labels = sum(batch.labels for batch in batches)
            total = 0.0
            for batch in batches:
                part = loss(model, batch) / labels
                part.backward()  # type: ignore[no-untyped-call]
                total += float(part.detach())
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.clip))
            if not math.isfinite(total) or not math.isfinite(norm):
                raise TrainingError(
                    f"step {step + 1} of {len(steps)}: the loss is {total}, the gradient norm {norm}; lower optimizer.learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            tokens = sum(batch.tokens for batch in batches)
            seconds = time.monotonic() - began
            progress.metric(step=step, loss=total, learning_rate=rate, gradient_norm=norm, tokens=tokens, labels=labels, seconds=seconds)
            bar.advance(1, loss=total, tokens_per_s=tokens / seconds)
            if (step + 1) % checkpoint_every == 0 and step + 1 < len(steps):
                save(parameters, optimizer, step + 1, scratch)
    model.eval()
    return summary(progress.read_metrics())


def save(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, scratch: Path) -> None:
    """Write a checkpoint atomically: trained parameters, optimizer, random state, and the number of finished steps."""
    state = {
        "step": step,
        "parameters": {n: p.detach() for n, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    temporary = scratch / (CHECKPOINT + ".tmp")
    with temporary.open("wb") as stream:  # given a path, torch may take a full disk for a success
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(scratch / CHECKPOINT)


def resume(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, scratch: Path) -> int:
    """Load the checkpoint, if there is one; returns the number of finished steps."""
    file = scratch / CHECKPOINT
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return int(state["step"])


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a finished training: mean loss of the first and last tenth, tokens, seconds, tokens per second."""
    tenth = max(1, len(rows) // 10)
    tokens, seconds = sum(r["tokens"] for r in rows), sum(r["seconds"] for r in rows)
    return {
        "steps": len(rows), "loss_first": sum(r["loss"] for r in rows[:tenth]) / tenth, "loss": sum(r["loss"] for r in rows[-tenth:]) / tenth,
        "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
    }  # fmt: skip
