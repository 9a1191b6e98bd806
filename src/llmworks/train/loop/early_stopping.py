"""Early stopping: keep the weights of the best evaluation and stop when it no longer improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmworks.core.errors import TrainingError
from llmworks.core.progress import write_whole

HIGHER = ("accuracy",)  # metrics where higher is better; for all others lower is


class Best:
    """The best evaluation so far and its saved weights.

    `metric`: the metric that is compared; `patience`: evaluations without improvement after which training stops, 0 =
    never; `folder`: where the weights are saved.
    """

    def __init__(self, metric: str, folder: Path, patience: int = 0) -> None:
        self.metric, self.file, self.patience = metric, folder / "best.safetensors", patience
        self.step: int | None = None
        self.value, self.worse = 0.0, 0

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state from the metrics of an interrupted run.

        Evaluations that are repeated after a resume give the same weights again.
        """
        for row in rows:
            if self.metric in row:
                self._compare(int(row["step"]), float(row[self.metric]))

    def _compare(self, step: int, value: float) -> bool:
        better = self.step is None or (value > self.value if self.metric in HIGHER else value < self.value)
        self.worse = 0 if better else self.worse + 1
        if better:
            self.step, self.value = step, value
        return better

    def heard(
        self, step: int, seen: Mapping[str, float], parameters: Mapping[str, nn.Parameter], *, first: bool
    ) -> bool:
        """Compare an evaluation and save improved weights in the first process. Return whether to stop."""
        if self.metric in seen and self._compare(step, float(seen[self.metric])) and first:
            from safetensors.torch import save

            write_whole(
                self.file, save({name: p.detach().contiguous() for name, p in parameters.items()}, {"step": str(step)})
            )
        return bool(self.patience) and self.worse >= self.patience

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best weights into the model. TrainingError when they are missing."""
        from safetensors import safe_open

        try:
            with safe_open(self.file, "pt") as kept, torch.no_grad():
                if kept.metadata().get("step") != str(self.step):
                    raise TrainingError(
                        f"{self.file}: has the weights of step {kept.metadata().get('step')}, but the best step"
                        f" was {self.step}; delete {self.file.parent} to start over"
                    )
                for name, p in parameters.items():
                    p.copy_(kept.get_tensor(name))
        except (OSError, KeyError) as error:
            raise TrainingError(
                f"{self.file}: cannot read the best weights ({error}); delete {self.file.parent} to start over"
            ) from None
