"""Run a command under bubblewrap with limited resources and a limited view of the host.

The command sees only the system's programs and libraries, read-only, and `/box`, its own in-memory directory: no
network, home, environment or other processes. A watcher outside counts time, memory and processes of everything it
starts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from llmworks.core.errors import MissingDependency, UserError
from llmworks.sandbox.seccomp import filter_program

WORK = "/box"
MB = 1 << 20
POLL = 0.02  # seconds between resource checks
INSTALL = "install it with: apt-get install bubblewrap"


@dataclass(frozen=True)
class Limits:
    """Resource limits of the code and all processes it starts together."""

    seconds: float = 10.0  # wall-clock time
    memory_mb: int = 512  # resident memory in total; also the address space of each process
    processes: int = 32  # threads of a process are not counted
    disk_mb: int = 64  # size of /box, /tmp and /dev/shm, each
    output_bytes: int = 1 << 20  # of stdout and stderr, each


@dataclass(frozen=True)
class SandboxResult:
    """Result of a run: it exited (`exit`, with its exit code, 128 + signal for a signal), or reached a limit."""

    stop_reason: Literal["exit", "time", "memory", "processes", "output"]
    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it exited with code 0."""
        return self.stop_reason == "exit" and self.exit_code == 0


@functools.cache
def require_bubblewrap() -> str:
    """Return the path of bubblewrap.

    MissingDependency, in one line, when it is not installed or the kernel does not allow it.
    """
    found = shutil.which("bwrap")
    if not found:
        raise MissingDependency(f"running untrusted code needs bubblewrap; {INSTALL}")
    probe = [found, *_namespace_arguments(), "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, env={}, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise MissingDependency(
            f"bubblewrap cannot isolate here ({why}); allow user namespaces (sysctl kernel.unprivileged_userns_clone=1,"
            " user.max_user_namespaces)"
        )
    return found


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: str = "",
    limits: Limits | None = None,
    readable_paths: Sequence[Path] = (),
) -> SandboxResult:
    """Run a command in `/box`, which contains `files` (relative path: content).

    `readable_paths` lists further host paths that it may read.

    Errors: MissingDependency without bubblewrap, UserError for a file path outside `/box`.
    """
    limits = limits or Limits()
    bwrap = require_bubblewrap()
    with contextlib.ExitStack() as stack:
        words = [bwrap, *_namespace_arguments(), *_host_mounts(readable_paths), *_writable_mounts(limits)]
        descriptors: list[int] = []

        def pass_content(content: bytes) -> str:
            descriptor = stack.enter_context(_memory_file(content))
            descriptors.append(descriptor)
            return str(descriptor)

        for name, content in (files or {}).items():
            words += [
                "--file",
                pass_content(content.encode() if isinstance(content, str) else content),
                _sandbox_path(name),
            ]
        if program := filter_program(platform.machine()):
            words += ["--seccomp", pass_content(program)]
        words += ["--chdir", WORK, "--", *_prlimit_command(limits), *command]
        began = time.monotonic()
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            env={},
            cwd="/",
        )
        return _supervise(process, stdin.encode(), limits, began)


def _sandbox_path(name: str) -> str:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{name!r}: a sandbox file must have a relative path without '..'")
    return f"{WORK}/{path}"


def _namespace_arguments() -> list[str]:
    own = [
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--hostname",
        "sandbox",
    ]
    return [*own, "--cap-drop", "ALL", "--new-session", "--die-with-parent", "--clearenv"]


def _host_mounts(readable_paths: Sequence[Path]) -> list[str]:
    """Return arguments that mount the system's programs and libraries read-only, with the symlinks to them."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/") / name
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    words += [
        "--ro-bind-try",
        "/etc/ld.so.cache",
        "/etc/ld.so.cache",
        "--ro-bind-try",
        "/etc/alternatives",
        "/etc/alternatives",
    ]
    for path in readable_paths:
        if not path.is_relative_to("/usr"):
            words += ["--ro-bind", str(path), str(path)]
    return words


def _writable_mounts(limits: Limits) -> list[str]:
    """Return arguments for the writable file systems: three tmpfs of fixed size; everything else is read-only."""
    size = str(limits.disk_mb * MB)
    words = ["--proc", "/proc", "--dev", "/dev"]
    for place in ("/dev/shm", "/tmp", WORK):
        words += ["--size", size, "--tmpfs", place]
    words += ["--remount-ro", "/dev", "--remount-ro", "/"]
    words += ["--remount-ro", "/proc"]  # host root owns /proc/sys inside, whatever its user id is there
    for name, value in (
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", WORK),
        ("LANG", "C.UTF-8"),
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
    ):
        words += ["--setenv", name, value]
    return words


def _prlimit_command(limits: Limits) -> list[str]:
    """Return the prlimit command; it runs inside, so processes are counted in the sandbox's namespace."""
    seconds = max(1, int(limits.seconds + 1))
    return [
        "/usr/bin/prlimit",
        f"--cpu={seconds}",
        f"--as={limits.memory_mb * MB}",
        f"--fsize={limits.disk_mb * MB}",
        "--nofile=256",
        f"--nproc={limits.processes}",
        "--core=0",
        "--memlock=0",
        "--",
    ]


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("llmworks")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


class _OutputReader(threading.Thread):
    """A thread that reads a stream up to a limit; `full` is set when the limit is reached."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        super().__init__(daemon=True)
        self.stream, self.limit = stream, limit
        self.output = bytearray()
        self.limit_reached = False
        self.start()

    def run(self) -> None:
        """Read until the end or the limit."""
        while piece := os.read(self.stream.fileno(), 1 << 16):
            self.output += piece[: self.limit - len(self.output)]
            if len(self.output) >= self.limit:
                self.limit_reached = True
                return

    def text(self) -> str:
        """Decode the output that was read."""
        return self.output.decode("utf-8", "replace")


def _write_stdin(stream: IO[bytes] | None, content: bytes) -> None:
    assert stream is not None
    with contextlib.suppress(OSError):
        stream.write(content)
    with contextlib.suppress(OSError):
        stream.close()


def _supervise(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, began: float) -> SandboxResult:
    """Wait for the process to exit, and kill it when a limit is reached."""
    readers = [_OutputReader(stream, limits.output_bytes) for stream in (process.stdout, process.stderr) if stream]
    threading.Thread(target=_write_stdin, args=(process.stdin, stdin), daemon=True).start()
    stop_reason: Literal["exit", "time", "memory", "processes", "output"] = "exit"
    try:
        while True:
            try:
                process.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                count, resident = _measure_usage(process.pid)
            if time.monotonic() - began > limits.seconds:
                stop_reason = "time"
            elif count > limits.processes:
                stop_reason = "processes"
            elif resident > limits.memory_mb * MB:
                stop_reason = "memory"
            elif any(reader.limit_reached for reader in readers):
                stop_reason = "output"
            if stop_reason != "exit":
                break
    finally:
        process.kill()  # bubblewrap's child dies with it (--die-with-parent), and the whole PID namespace with that
        process.wait()
    for reader in readers:
        reader.join(5)
        reader.stream.close()
    if stop_reason == "exit" and any(reader.limit_reached for reader in readers):
        stop_reason = "output"
    return SandboxResult(
        stop_reason, process.returncode, readers[0].text(), readers[1].text(), time.monotonic() - began
    )


def _measure_usage(parent: int) -> tuple[int, int]:
    """Return (processes, resident bytes) of all descendants of a process, without the sandbox's own three processes."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(place.name)], resident[int(place.name)] = int(fields[1]), int(fields[21])
    below: set[int] = {parent}
    grown = True
    while grown:
        new = {child for child, above in parents.items() if above in below} - below
        below |= new
        grown = bool(new)
    below.discard(parent)
    return max(0, len(below) - 1), sum(resident[process] for process in below) * os.sysconf("SC_PAGE_SIZE")
