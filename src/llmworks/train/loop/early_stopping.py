"""Early stopping: keep the weights of the best evaluation and stop when it no longer improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmworks.core.errors import TrainingError
from llmworks.core.progress import write_atomic

GREATER_IS_BETTER = ("accuracy",)  # metrics where higher is better; for all others lower is


class EarlyStopping:
    """The best evaluation so far and its saved weights.

    `metric`: the metric that is compared; `patience`: evaluations without improvement after which training stops, 0 =
    never; `folder`: where the weights are saved.
    """

    def __init__(self, metric: str, folder: Path, patience: int = 0) -> None:
        self.metric, self.weights_file, self.patience = metric, folder / "best.safetensors", patience
        self.best_step: int | None = None
        self.best_value, self.num_bad_evaluations = 0.0, 0

    def restore_state(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state from the metrics of an interrupted run.

        Evaluations that are repeated after a resume give the same weights again.
        """
        for row in rows:
            if self.metric in row:
                self._update_best(int(row["step"]), float(row[self.metric]))

    def _update_best(self, step: int, value: float) -> bool:
        better = self.best_step is None or (
            value > self.best_value if self.metric in GREATER_IS_BETTER else value < self.best_value
        )
        self.num_bad_evaluations = 0 if better else self.num_bad_evaluations + 1
        if better:
            self.best_step, self.best_value = step, value
        return better

    def update(
        self, step: int, metrics: Mapping[str, float], parameters: Mapping[str, nn.Parameter], *, is_main: bool
    ) -> bool:
        """Compare an evaluation and save improved weights in the first process. Return whether to stop."""
        if self.metric in metrics and self._update_best(step, float(metrics[self.metric])) and is_main:
            from safetensors.torch import save

            write_atomic(
                self.weights_file,
                save({name: p.detach().contiguous() for name, p in parameters.items()}, {"step": str(step)}),
            )
        return bool(self.patience) and self.num_bad_evaluations >= self.patience

    def load_best_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best weights into the model. TrainingError when they are missing."""
        from safetensors import safe_open

        try:
            with safe_open(self.weights_file, "pt") as best_weights, torch.no_grad():
                if best_weights.metadata().get("step") != str(self.best_step):
                    raise TrainingError(
                        f"{self.weights_file}: has the weights of step {best_weights.metadata().get('step')}, but"
                        " the best step"
                        f" was {self.best_step}; delete {self.weights_file.parent} to start over"
                    )
                for name, p in parameters.items():
                    p.copy_(best_weights.get_tensor(name))
        except (OSError, KeyError) as error:
            raise TrainingError(
                f"{self.weights_file}: cannot read the best weights ({error}); delete {self.weights_file.parent} to"
                " start over"
            ) from None
