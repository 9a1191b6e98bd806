"""Checkpoints: everything that decides the next step, written atomically; the newest few are kept.

A folder in the format of `torch.distributed.checkpoint`, so that any number of processes reads what another number
wrote, with `state.json` beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as write

from llmworks.core.errors import TrainingError
from llmworks.train.distributed.world import World

FOLDER = "checkpoints"
STATE = "state.json"


@dataclass
class TrainingState:
    """The state of a training run that this process holds.

    `ema`: exponential moving average of the parameters, if one is kept; `scaler`: the fp16 gradient scaler.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    ema: dict[str, Tensor] = field(default_factory=dict)
    scaler: Any = None
    world: World = field(default_factory=lambda: World(torch.device("cpu")))

    def get_tensors(self) -> dict[str, Any]:
        """Return all tensors of the run, by name."""
        tensors: dict[str, Any] = {f"parameters.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": mean for name, mean in self.ema.items()}
        for name, (optimizer, p) in self._map_optimizers().items():
            tensors |= {
                f"moments.{name}.{key}": value
                for key, value in optimizer.state.get(p, {}).items()
                if isinstance(value, Tensor)
            }
        return tensors

    def _map_optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """Return each parameter with its optimizer, by parameter name."""
        names = {id(p): name for name, p in self.parameters.items()}
        return {
            names[id(p)]: (optimizer, p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }


def save(training_state: TrainingState, step: int, scratch: Path, save_total_limit: int) -> None:
    """Write the checkpoint after `step` finished steps and delete all but the newest `save_total_limit`.

    A collective operation: all processes take part.

    Errors: OSError for a full disk; existing checkpoints stay.
    """
    world = training_state.world
    target = scratch / FOLDER / f"step-{step:09d}"
    temporary = target.with_suffix(".tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    try:
        random = {f"random.{world.rank}": torch.get_rng_state()} | (
            {f"cuda.{world.rank}": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {}
        )
        with _ignore_warnings():
            write(
                training_state.get_tensors() | random,
                storage_writer=FileSystemWriter(temporary),
                no_dist=world.size == 1,
            )
        if world.is_main:
            state = {
                "step": step,
                "processes": world.size,
                "optimizers": [type(o).__name__ for o in training_state.optimizers],
                "scaler": training_state.scaler.state_dict() if training_state.scaler is not None else {},
            }
            with (temporary / STATE).open("w", encoding="utf-8") as stream:
                json.dump(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
    except BaseException as error:  # a full disk, an interrupt: existing checkpoints stay
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointException):
            first = next(failure[0] for failure in error.failures.values())
            raise (
                first
                if isinstance(first, (OSError, KeyboardInterrupt))
                else TrainingError(f"{temporary}: cannot write the checkpoint ({type(first).__name__}: {first})")
            ) from None
        raise
    if world.is_main:
        temporary.replace(target)
        for old in list_checkpoints(scratch)[:-save_total_limit]:
            shutil.rmtree(old)
    world.barrier()


def list_checkpoints(scratch: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in (scratch / FOLDER).glob("step-*") if path.suffix != ".tmp")


def resume(training_state: TrainingState, scratch: Path) -> int:
    """Load the newest checkpoint, if there is one, and return the number of finished steps.

    A collective operation. The number of processes may differ from the one that wrote the checkpoint.

    Errors: TrainingError for an unreadable checkpoint, or one of another model or optimizer.
    """
    world = training_state.world
    files = list_checkpoints(scratch)
    if not files:
        return 0
    folder = files[-1]
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        optimizer_names, processes, finished, scaler = (
            state["optimizers"],
            int(state["processes"]),
            int(state["step"]),
            state["scaler"],
        )
        reader = FileSystemReader(folder)
        sizes = {
            name: tuple(entry.size)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if hasattr(entry, "size")
        }
    except Exception as error:  # torch raises many exception types for a broken file
        raise TrainingError(_describe_broken(folder, error)) from None
    wanted = _check_compatible(training_state, world, sizes, optimizer_names, folder)
    for name, (
        optimizer,
        p,
    ) in training_state._map_optimizers().items():  # optimizer moments exist only after the first step
        for key in [k for k in sizes if k.startswith(f"moments.{name}.") and "." not in k[len(f"moments.{name}.") :]]:
            moment = (
                torch.zeros_like(p.detach())
                if sizes[key] == tuple(p.shape)
                else torch.zeros(sizes[key], device=p.device)
            )
            optimizer.state[p][key.rpartition(".")[2]] = moment
            wanted[key] = moment
    random = {
        name: torch.empty(sizes[name], dtype=torch.uint8)
        for name in (f"random.{world.rank}", f"cuda.{world.rank}")
        if name in sizes
    }
    try:
        with _ignore_warnings():
            load(wanted | random, storage_reader=reader, no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
        raise TrainingError(_describe_broken(folder, error)) from None
    if training_state.scaler is not None:
        training_state.scaler.load_state_dict(scaler)
    if processes == world.size:  # with another number of processes the random states do not carry over
        torch.set_rng_state(random[f"random.{world.rank}"])
        if f"cuda.{world.rank}" in random and world.device.type == "cuda":
            torch.cuda.set_rng_state(random[f"cuda.{world.rank}"], world.device)
    return finished


def _check_compatible(
    training_state: TrainingState, world: World, sizes: dict[str, tuple[Any, ...]], optimizer_names: Any, folder: Path
) -> dict[str, Any]:
    """Return the tensors to load. TrainingError for a checkpoint of another model or optimizer."""
    wanted = training_state.get_tensors()
    own = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    differs = next((name for name, size in own.items() if sizes.get(name) != size), "")
    if not differs and world.get_axis_size("pipeline") == 1:
        differs = next((name for name in sizes if name.startswith(("parameters.", "average.")) and name not in own), "")
    if differs or optimizer_names != [type(o).__name__ for o in training_state.optimizers]:
        what = differs.removeprefix("parameters.") if differs else "the optimizer"
        raise TrainingError(
            f"{folder}: checkpoint of another configuration ({what} differs); delete {folder.parent} to start over"
        )
    return wanted


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Suppress torch's warning about a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _describe_broken(folder: Path, error: BaseException) -> str:
    return f"{folder}: cannot read the checkpoint ({type(error).__name__}); delete it to resume from the previous one"
