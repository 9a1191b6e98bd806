"""Several processes of one command on this machine (`--nproc`): each gets its number as torchrun gives it; when one dies all stop, with one message.

On several machines torchrun does this, with the same command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from llmworks.errors import LlmworksError, UserError, WorkerLost

LAUNCHED = "LLMWORKS_LAUNCHED"  # set in processes whose death is told here


def launch(words: Sequence[str], processes: int) -> int:
    """Run `llmworks WORDS` so many times at once; returns the exit code. Errors: WorkerLost where one was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("LLMWORKS_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LLMWORKS_THREADS": threads, "OMP_NUM_THREADS": threads, LAUNCHED: "1"}
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as files:
        told = [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1)]
        try:
            for rank in range(processes):
                silent = {"stdout": subprocess.DEVNULL, "stderr": told[rank - 1]} if rank else {}
                started.append(subprocess.Popen([sys.executable, "-m", "llmworks.cli", *words], env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **silent))  # type: ignore[call-overload]
            first = _first_to_fail(started)
        except KeyboardInterrupt:
            for process in started:
                process.send_signal(signal.SIGINT)
            _end(started, 30)
            return 130
        if first is None:
            return 0
        _end(started, 0 if started[first].returncode < 0 else 5)
        code = started[first].returncode
        if code < 0 or code == WorkerLost.exit_code:
            dead = next((rank for rank, process in enumerate(started) if process.returncode < 0 and rank == first), first)
            killed = f"was killed (signal {-started[dead].returncode})" if started[dead].returncode < 0 else "ended"
            raise WorkerLost(f"process {dead} of {processes} {killed}; all are stopped. The same command goes on from the last checkpoint")
        if first:  # what the first process says is seen already
            told[first - 1].seek(0)
            lines = told[first - 1].read().decode(errors="replace").strip().splitlines()
            sys.stderr.write(f"process {first} of {processes}: {lines[-1] if lines else 'ended without a word'}\n")
        return code


def _first_to_fail(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The number of the first process that ends badly; None when all end well. One that was killed goes before those that miss it."""
    while True:
        codes = [process.poll() for process in started]
        if any(codes):
            time.sleep(0.3)  # the death of one is the failure of others within moments
            codes = [process.poll() for process in started]
            return min((rank for rank, code in enumerate(codes) if code), key=lambda rank: (codes[rank] or 0) > 0)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(started: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Wait so long for all, then kill what is left."""
    until = time.monotonic() + patience
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def spread(words: Sequence[str]) -> int | None:
    """The exit code of a command with `--nproc N`, which is run so many times; None for every other command. Errors: UserError."""
    given = [i for i, word in enumerate(words) if word == "--nproc" or word.startswith("--nproc=")]
    if not given or LAUNCHED in os.environ:
        return None
    at = given[-1]
    text = words[at].partition("=")[2] if "=" in words[at] else words[at + 1] if at + 1 < len(words) else ""
    if not text.isdigit() or not int(text):
        raise UserError(f"--nproc {text}: it must be a number of processes")
    rest = [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]
    if int(text) == 1:
        return None
    if "RANK" in os.environ:
        raise UserError("--nproc is given in a process that torchrun started; leave it out")
    return launch(rest, int(text))


def is_told(error: LlmworksError) -> bool:
    """Whether whoever started this process tells of it."""
    return LAUNCHED in os.environ and isinstance(error, WorkerLost)
