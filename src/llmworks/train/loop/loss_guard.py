"""Loss guard: stop a training whose loss is not finite or spikes, and name the batch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from llmworks.core.errors import TrainingError

WINDOW, MIN_STEPS = 50, 20  # window of steps for the median loss, and how many it needs


class LossGuard:
    """Detector of loss spikes.

    `threshold`: nats above the median of the last steps at which the run stops; with fewer than 20 steps, three times
    that above the first loss; 0 = never.
    """

    def __init__(self, threshold: float = 0.0, previous_losses: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self.losses = deque(previous_losses, WINDOW)

    def check(self, step: int, steps: int, loss: float, norm: float, batch: str, *, scaled: bool = False) -> None:
        """Check the loss and gradient norm of a step before its gradients are used.

        `scaled`: a non-finite gradient norm is left to the fp16 gradient scaler.

        Errors: TrainingError.
        """
        where = f"step {step + 1} of {steps}{f' ({batch})' if batch else ''}"
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            raise TrainingError(
                f"{where}: the loss is {loss}, the gradient norm is {norm}; lower optimizer.learning_rate, or"
                " inspect this batch"
            )
        if (
            self.threshold
            and len(self.losses) >= MIN_STEPS
            and loss > (median := statistics.median(self.losses)) + self.threshold
        ):
            raise TrainingError(
                f"{where}: the loss is {loss:.3f}, {loss - median:.3f} above the median of the"
                f" last {len(self.losses)} steps; inspect this batch, lower optimizer.learning_rate, or raise"
                " loss_spike_threshold (0 = never stop)"
            )
        if self.threshold and 0 < len(self.losses) < MIN_STEPS and loss > self.losses[0] + 3 * self.threshold:
            raise TrainingError(
                f"{where}: the loss is {loss:.3f}, the first one was {self.losses[0]:.3f}; lower"
                " optimizer.learning_rate, or raise loss_spike_threshold (0 = never stop)"
            )
        self.losses.append(loss)
