"""Faults of training that both self-tests have to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmworks.train.distributed.sharding import DistributedModel
from llmworks.train.loop import checkpoints, loop


def wrong_parts(patch: pytest.MonkeyPatch) -> None:
    def backward(self: DistributedModel, batches: Any, loss: Any, labels: float, scaler: Any, precision: str) -> float:
        total = 0.0
        for batch in batches:  # the mean of means, as many frameworks had it until 2024
            part = loss(self.forward, batch) / batch.labels / len(batches)
            part.backward()
            total += float(part.detach())
        return total

    patch.setattr(DistributedModel, "backward", backward)


def wrong_resume(patch: pytest.MonkeyPatch) -> None:
    real = checkpoints.resume

    def without_moments(running: Any, scratch: Path) -> int:
        step = real(running, scratch)
        for optimizer in running.optimizers:
            optimizer.state.clear()
        return step

    patch.setattr(checkpoints, "resume", without_moments)


def wrong_learning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "learning_rate", lambda *a: 0.0)
