"""Watches a training: stops at a loss that is no number, or that jumps, and says which batch it was. Knows no model."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from llmworks.core.errors import TrainingError

LOOK, LEAST = 50, 20  # steps that a jump is measured against, and how many there must be


class Watch:
    """`spike`: how many nats above the median of the last steps stop the run, thrice that above the first loss while
    there are few; 0: none does.
    """

    def __init__(self, spike: float = 0.0, earlier: Sequence[float] = ()) -> None:
        self.spike = spike
        self.losses = deque(earlier, LOOK)

    def look(self, step: int, steps: int, loss: float, norm: float, batch: str, *, scaled: bool = False) -> None:
        """Hear of a step before its gradients are used.

        `scaled`: a norm that is no number is left to the scaler of fp16.

        Errors: TrainingError.
        """
        where = f"step {step + 1} of {steps}{f' ({batch})' if batch else ''}"
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            raise TrainingError(
                f"{where}: the loss is {loss}, the gradient norm {norm}; lower optimizer.learning_rate, or look at this"
                " batch"
            )
        if self.spike and len(self.losses) >= LEAST and loss > (usual := statistics.median(self.losses)) + self.spike:
            raise TrainingError(
                f"{where}: the loss is {loss:.3f}, {loss - usual:.3f} above the median of the last {len(self.losses)}"
                " steps; look at this batch, lower optimizer.learning_rate, or set spike to more (0: never stop)"
            )
        if self.spike and 0 < len(self.losses) < LEAST and loss > self.losses[0] + 3 * self.spike:
            raise TrainingError(
                f"{where}: the loss is {loss:.3f}, it began at {self.losses[0]:.3f}; lower optimizer.learning_rate, or"
                " set spike to more (0: never stop)"
            )
        self.losses.append(loss)
