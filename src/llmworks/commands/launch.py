"""Launch several processes of one command on this machine (`--nproc`), as torchrun does.

Each gets its rank; when one fails, all are stopped with one error message. For several machines use torchrun with the
same command.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence

from llmworks.core.errors import LlmworksError, UserError, WorkerLost

LAUNCHED = "LLMWORKS_LAUNCHED"  # set in processes whose failure is reported by the launcher
RANK_PREFIX = re.compile(r"^\[rank\d+\]:")  # prefix of torch's error lines
LOST_EXIT_CODE = 75  # exit code of a process that lost contact with another one, which is the cause


def launch(words: Sequence[str], processes: int) -> int:
    """Run `llmworks WORDS` in this many processes; return the exit code. WorkerLost when one was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("LLMWORKS_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LLMWORKS_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        LAUNCHED: uuid.uuid4().hex,
    }
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as files:
        error_files = [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1)]
        try:
            for rank in range(processes):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                output, errors = (subprocess.DEVNULL, error_files[rank - 1]) if rank else (None, None)
                command = [sys.executable, "-m", "llmworks.cli", *words]
                started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=errors))
            first = _find_failed_rank(started)
        except KeyboardInterrupt:
            for process in started:
                process.send_signal(signal.SIGINT)
            _wait_or_kill(started, 30)
            return 130
        if first is None:
            return 0
        _wait_or_kill(started, 0 if started[first].returncode < 0 else 5)
        code = started[first].returncode
        if code < 0 or code == LOST_EXIT_CODE:
            how = (
                f"process {first} of {processes} was killed (signal {-code})"
                if code < 0
                else f"the {processes} processes lost contact with each other"
            )
            raise WorkerLost(f"{how}; all are stopped. Run the same command again to resume from the last checkpoint")
        if first:  # rank 0's output is shown already
            error_files[first - 1].seek(0)
            lines = [
                line
                for line in (
                    RANK_PREFIX.sub("", line).strip()
                    for line in error_files[first - 1].read().decode(errors="replace").splitlines()
                )
                if line
            ]
            sys.stderr.write(
                f"process {first} of {processes}: {lines[-1] if lines else 'ended without an error message'}\n"
            )
        return code


def _find_failed_rank(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Return the rank of the process that caused the failure; None when all end well.

    A killed process comes first, then the first that raised an error itself, last those that lost contact with another
    one. One failure makes others fail within moments, and they may end earlier.
    """

    def wait_for_codes(patience: float, enough: Callable[[Sequence[int | None]], bool]) -> list[int | None]:
        until = time.monotonic() + patience
        while not enough(found := [process.poll() for process in started]) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    wait_for_codes(math.inf, lambda found: any(found) or all(code == 0 for code in found))
    wait_for_codes(5, lambda found: any(code and code != LOST_EXIT_CODE for code in found) or not any(found))
    ended = wait_for_codes(2, lambda found: found[0] is not None or min(code or 0 for code in found) < 0)
    failed = [rank for rank, code in enumerate(ended) if code]
    return min(failed, key=lambda rank: (ended[rank] == LOST_EXIT_CODE, (ended[rank] or 0) > 0)) if failed else None


def _wait_or_kill(started: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Wait this many seconds for all processes, then kill the rest."""
    until = time.monotonic() + patience
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def launch_if_distributed(words: Sequence[str]) -> int | None:
    """Run a command with `--nproc N` in N processes and return the exit code; None for every other command.

    Errors: UserError.
    """
    given = [i for i, word in enumerate(words) if word == "--nproc" or word.startswith("--nproc=")]
    if not given or LAUNCHED in os.environ:
        return None
    at = given[-1]
    text = words[at].partition("=")[2] if "=" in words[at] else words[at + 1] if at + 1 < len(words) else ""
    if not text.isdecimal() or not int(text):
        raise UserError(f"--nproc {text}: must be a positive integer")
    rest = [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]
    if int(text) == 1:
        return None
    if "RANK" in os.environ:
        raise UserError("--nproc cannot be used in a process started by torchrun; remove it")
    return launch(rest, int(text))


def is_reported_by_launcher(error: LlmworksError) -> bool:
    """Return whether the launcher of this process reports the error."""
    return LAUNCHED in os.environ and isinstance(error, WorkerLost)
