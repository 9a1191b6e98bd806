"""Process groups of a training: ranks, device mesh, reductions and barriers.

A single process works the same way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llmworks.core.errors import LlmworksError, WorkerLost
from llmworks.train.distributed.config import DataParallelConfig, ParallelConfig

AXES = ("pipeline", "data", "tensor")  # the innermost axis has neighboring ranks, with the fastest links
TIMEOUT = timedelta(hours=1)  # other ranks wait while the first evaluates, samples and saves
Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """One process among `size`. `mesh` [pipeline, data, tensor] if there are several."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which evaluates, logs and saves."""
        return self.rank == 0

    def get_axis_size(self, axis: str) -> int:
        """Return the number of processes along an axis."""
        return 1 if self.mesh is None else int(self.mesh[axis].size())

    def get_axis_rank(self, axis: str) -> int:
        """Return the rank of this process along an axis."""
        return 0 if self.mesh is None else int(self.mesh[axis].get_local_rank())

    def get_axis_group(self, axis: str) -> Any:
        """Return the process group along an axis."""
        return self.mesh[axis].get_group()

    def sum_over_axis(self, values: list[float], axis: str = "data") -> list[float]:
        """Sum each value over the processes along an axis (all-reduce)."""
        if self.get_axis_size(axis) == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed, group=self.get_axis_group(axis))
        return summed.tolist()

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value in all processes (broadcast)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes (barrier)."""
        if self.size > 1:
            dist.barrier()


def get_device() -> torch.device:
    """Return the device of this process: its GPU, if there is one."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def get_world_size() -> int:
    """Return the number of processes launched together (torchrun, `--nproc`)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def init_world(parallel: ParallelConfig | DataParallelConfig) -> Iterator[World]:
    """Initialize the process group that this process was launched in.

    Errors: UserError for a number of processes that is not divisible; WorkerLost if another process is gone.
    """
    size, rank = get_world_size(), int(os.environ.get("RANK", "0"))
    parallel.get_data_parallel_size(size)
    device = get_device()
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(
            device.type,
            (parallel.pipeline_parallel_size, parallel.get_data_parallel_size(size), parallel.tensor_parallel_size),
            mesh_dim_names=AXES,
        )
        yield World(device, rank, size, mesh)
    except LlmworksError:
        raise
    except RuntimeError as error:  # gloo and nccl raise nothing more specific
        if any(
            word in str(error)
            for word in ("Connection", "connection", "timed out", "Timed out", "peer", "NCCL", "Gloo", "gloo")
        ):
            raise WorkerLost(
                f"process {rank} of {size} lost the connection to another process; run the same command again to"
                " resume from the last checkpoint"
            ) from error
        raise
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
