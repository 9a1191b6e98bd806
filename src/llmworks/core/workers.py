"""A pool for independent units of work: this process, several processes, or a Ray cluster.

The caller derives units from its inputs alone and combines results in the units' order, so that a result never depends
on the pool.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from llmworks.core.errors import MissingDependency, UserError, WorkerLost

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

Unit = TypeVar("Unit")
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerPool:
    """`workers` local processes, or `workers` parallel tasks on a Ray cluster (`address` empty: a local cluster)."""

    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    address: str = ""
    _executors: list[ProcessPoolExecutor] = field(
        default_factory=list, compare=False, repr=False
    )  # reused by the next call

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}, it must be 1 or more")
        if self.address and self.engine != "ray":
            raise UserError("--address is for a Ray cluster; add --engine ray")

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every unit as they finish. `function` is module-level, its argument picklable.

        Errors: what the function raises; WorkerLost when a worker was killed twice; MissingDependency without the extra
        `ray`.
        """
        if self.engine == "ray":
            yield from self._map_ray(function, units)
        elif self.workers == 1 or len(units) < 2:
            for index, unit in enumerate(units):
                yield index, function(unit)
        else:
            yield from self._map_processes(function, units)

    def _map_processes(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[tuple[int, Result]]:
        from concurrent.futures.process import BrokenProcessPool

        left = dict(enumerate(units))
        for attempt in (1, 2):
            try:
                for index, result in self._run_processes(function, left):
                    del left[index]
                    yield index, result
                return
            except BrokenProcessPool:
                if attempt == 2:
                    raise WorkerLost(
                        f"a worker process was killed, twice (out of memory?); {len(units) - len(left)} of"
                        f" {len(units)} units are done and kept; run the same command again to resume, with fewer"
                        " --workers if memory is short"
                    ) from None

    def _run_processes(
        self, function: Callable[[Unit], Result], units: dict[int, Unit]
    ) -> Iterator[tuple[int, Result]]:
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

        if not self._executors:
            spawn = multiprocessing.get_context("spawn")
            self._executors.append(
                ProcessPoolExecutor(self.workers, spawn, initializer=_init_worker, initargs=(os.getpid(),))
            )
        executor = self._executors[0]
        try:
            waiting = {executor.submit(function, unit): index for index, unit in units.items()}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                # results before a broken pool's error, so that finished units count
                for future in sorted(done, key=lambda f: f.exception() is not None):
                    yield waiting.pop(future), future.result()
        except BaseException:
            self._executors.clear()
            for child in multiprocessing.active_children():
                child.terminate()
            executor.shutdown(wait=True, cancel_futures=True)
            raise

    def _map_ray(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[tuple[int, Result]]:
        try:
            import ray
        except ImportError:
            raise MissingDependency("--engine ray needs Ray; install it with: pip install 'llmworks[ray]'") from None

        if not ray.is_initialized():
            _connect_ray(ray, self.address, self.workers)
        remote: Any = ray.remote(max_retries=1)(_call_unit)  # Ray accepts plain functions only
        todo = list(enumerate(units))[::-1]
        running: dict[Any, int] = {}
        try:
            while todo or running:
                while todo and len(running) < self.workers:
                    index, unit = todo.pop()
                    running[remote.remote(function, unit)] = index
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    yield running[reference], ray.get(reference)
                    del running[reference]
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
        ) as error:
            raise WorkerLost(
                f"a Ray worker was lost ({type(error).__name__}); finished units are kept, run the same command"
                " again to resume"
            ) from None
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _call_unit(function: Callable[[Unit], Result], unit: Unit) -> Result:
    return function(unit)


def _connect_ray(ray: Any, address: str, workers: int) -> None:
    """Connect to the cluster at `address`, or start a local one with as many CPUs as workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself retries for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: cannot connect to a Ray cluster ({str(error).splitlines()[0]})"
        ) from None


def _init_worker(parent: int) -> None:
    """Initialize a worker: leave Ctrl-C to the parent, use one thread, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
