"""Checkpoints: everything that decides the next step, written whole or not at all, the last few kept. Knows no loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.errors import TrainingError

FOLDER = "checkpoints"


@dataclass
class Running:
    """What a run consists of. `average`: a running mean of the parameters, where one is kept; `scaler`: of losses in fp16."""

    parameters: dict[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    average: dict[str, Tensor] = field(default_factory=dict)
    scaler: Any = None


def save(running: Running, step: int, scratch: Path, keep: int) -> None:
    """Write the checkpoint after `step` finished steps, and delete older ones than the last `keep`. Errors: OSError for a full disk; what was there stays."""
    folder = scratch / FOLDER
    folder.mkdir(exist_ok=True)
    state = {
        "step": step, "parameters": {name: p.detach() for name, p in running.parameters.items()}, "optimizers": [o.state_dict() for o in running.optimizers], "average": running.average,
        "scaler": running.scaler.state_dict() if running.scaler is not None else {}, "rng": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip
    target = folder / f"step-{step:09d}.pt"
    temporary = target.with_suffix(".tmp")
    try:
        with temporary.open("wb") as stream:  # given a path, torch may take a full disk for a success
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:  # a full disk, an interrupt: what was there stays
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(target)
    for old in found(scratch)[:-keep]:
        old.unlink()


def found(scratch: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in (scratch / FOLDER).glob("step-*.pt"))


def resume(running: Running, scratch: Path) -> int:
    """Load the newest checkpoint, if there is one; returns the number of finished steps.

    Errors: TrainingError for one that cannot be read, or of another model or optimizer.
    """
    files = found(scratch)
    if not files:
        return 0
    file = files[-1]
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise TrainingError(f"{file}: the checkpoint cannot be read ({type(error).__name__}); delete it to go on from the one before") from None
    theirs = {name: tuple(tensor.shape) for name, tensor in state["parameters"].items()}
    ours = {name: tuple(p.shape) for name, p in running.parameters.items()}
    if theirs != ours or len(state["optimizers"]) != len(running.optimizers) or set(state["average"]) != set(running.average):
        differs = next((name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)), "the optimizer or the average")
        raise TrainingError(f"{file}: is the checkpoint of another configuration ({differs} differs); delete {file.parent} to begin anew")
    with torch.no_grad():
        for name, parameter in running.parameters.items():
            parameter.copy_(state["parameters"][name])
        for name, tensor in running.average.items():
            tensor.copy_(state["average"][name])
    for optimizer, saved in zip(running.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if running.scaler is not None:
        running.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    return int(state["step"])
