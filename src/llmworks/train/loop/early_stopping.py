"""The best of a training's looks: its weights are kept, and a training that gets no better may end early.

Knows no model and no loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmworks.core.errors import TrainingError
from llmworks.core.progress import write_whole

HIGHER = ("accuracy",)  # metrics of which more is better; of the others less is


class Best:
    """Hears of every look.

    `metric`: what is compared; `patience`: looks without a better one after which it is enough, 0: never; `folder`:
    where the weights are kept.
    """

    def __init__(self, metric: str, folder: Path, patience: int = 0) -> None:
        self.metric, self.file, self.patience = metric, folder / "best.safetensors", patience
        self.step: int | None = None
        self.value, self.worse = 0.0, 0

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take up what was seen before a training was interrupted.

        Looks that come again give the same weights again.
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
        """Compare a look; keep the weights of a better one, in the first process. Returns whether it is enough."""
        if self.metric in seen and self._compare(step, float(seen[self.metric])) and first:
            from safetensors.torch import save

            write_whole(
                self.file, save({name: p.detach().contiguous() for name, p in parameters.items()}, {"step": str(step)})
            )
        return bool(self.patience) and self.worse >= self.patience

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the best weights back. TrainingError when they are gone."""
        from safetensors import safe_open

        try:
            with safe_open(self.file, "pt") as kept, torch.no_grad():
                if kept.metadata().get("step") != str(self.step):
                    raise TrainingError(
                        f"{self.file}: is of step {kept.metadata().get('step')}, the best was {self.step}; delete"
                        f" {self.file.parent} to begin anew"
                    )
                for name, p in parameters.items():
                    p.copy_(kept.get_tensor(name))
        except (OSError, KeyError) as error:
            raise TrainingError(
                f"{self.file}: the best weights cannot be read ({error}); delete {self.file.parent} to begin anew"
            ) from None
