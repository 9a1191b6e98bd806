"""Run a command under bubblewrap: what it sees of the host, what it may use up, and how it ended.

It sees the system's programs and libraries, read-only; `/box`, its own directory in memory; and nothing else: no
network, no home, no environment, no other process. Time, memory and processes are counted over everything it starts, by
a watcher outside.
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
POLL = 0.02  # seconds between two looks at what is used
INSTALL = "install it with: apt-get install bubblewrap"


@dataclass(frozen=True)
class Limits:
    """What the code and all that it starts may use up together."""

    seconds: float = 10.0  # of the clock
    memory_mb: int = 512  # resident; also of address space, per process
    processes: int = 32  # threads of one process count once
    disk_mb: int = 64  # files in /box, in /tmp and in /dev/shm, each
    output_bytes: int = 1 << 20  # of standard output, and of standard error


@dataclass(frozen=True)
class Outcome:
    """How it ended: by itself (`exit`, with its exit code, 128 + signal for a signal), or because a limit was
    reached.
    """

    ended: Literal["exit", "time", "memory", "processes", "output"]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.ended == "exit" and self.code == 0


@functools.cache
def require() -> str:
    """The path of bubblewrap.

    MissingDependency, in one line, when it is not there or the kernel does not let it work.
    """
    found = shutil.which("bwrap")
    if not found:
        raise MissingDependency(f"running untrusted code needs bubblewrap; {INSTALL}")
    probe = [found, *_namespaces(), "--ro-bind", "/", "/", "--proc", "/proc", "true"]
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
    show: Sequence[Path] = (),
) -> Outcome:
    """Run a command in `/box`, which holds `files` (relative path: content).

    `show` names what else of the host it may read.

    Errors: MissingDependency without bubblewrap, UserError for a file name that leaves `/box`.
    """
    limits = limits or Limits()
    bwrap = require()
    with contextlib.ExitStack() as stack:
        words = [bwrap, *_namespaces(), *_host(show), *_room(limits)]
        descriptors: list[int] = []

        def passed(content: bytes) -> str:
            descriptor = stack.enter_context(_memory_file(content))
            descriptors.append(descriptor)
            return str(descriptor)

        for name, content in (files or {}).items():
            words += ["--file", passed(content.encode() if isinstance(content, str) else content), _inside(name)]
        if program := filter_program(platform.machine()):
            words += ["--seccomp", passed(program)]
        words += ["--chdir", WORK, "--", *_rlimits(limits), *command]
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
        return _watched(process, stdin.encode(), limits, began)


def _inside(name: str) -> str:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{name!r}: a file of the sandbox must have a relative path")
    return f"{WORK}/{path}"


def _namespaces() -> list[str]:
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


def _host(show: Sequence[Path]) -> list[str]:
    """The system's programs and libraries, read-only, with the links that lead to them."""
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
    for path in show:
        if not path.is_relative_to("/usr"):
            words += ["--ro-bind", str(path), str(path)]
    return words


def _room(limits: Limits) -> list[str]:
    """What can be written: three directories in memory, each of a fixed size; all else is closed."""
    size = str(limits.disk_mb * MB)
    words = ["--proc", "/proc", "--dev", "/dev"]
    for place in ("/dev/shm", "/tmp", WORK):
        words += ["--size", size, "--tmpfs", place]
    words += ["--remount-ro", "/dev", "--remount-ro", "/"]
    words += ["--remount-ro", "/proc"]  # root outside is the owner of /proc/sys inside, whatever it is called there
    for name, value in (
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", WORK),
        ("LANG", "C.UTF-8"),
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
    ):
        words += ["--setenv", name, value]
    return words


def _rlimits(limits: Limits) -> list[str]:
    """Limits of each process, set inside, so that processes are counted in the sandbox's own namespace."""
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


class _Reader(threading.Thread):
    """Keeps what a stream says, up to a limit; says when there is more."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        super().__init__(daemon=True)
        self.stream, self.limit = stream, limit
        self.kept = bytearray()
        self.full = False
        self.start()

    def run(self) -> None:
        """Read until the end, or until there is too much."""
        while piece := os.read(self.stream.fileno(), 1 << 16):
            self.kept += piece[: self.limit - len(self.kept)]
            if len(self.kept) >= self.limit:
                self.full = True
                return

    def text(self) -> str:
        """What was kept."""
        return self.kept.decode("utf-8", "replace")


def _feed(stream: IO[bytes] | None, content: bytes) -> None:
    assert stream is not None
    with contextlib.suppress(OSError):
        stream.write(content)
    with contextlib.suppress(OSError):
        stream.close()


def _watched(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, began: float) -> Outcome:
    """Wait for the end, and make one when a limit is reached."""
    readers = [_Reader(stream, limits.output_bytes) for stream in (process.stdout, process.stderr) if stream]
    threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True).start()
    ended: Literal["exit", "time", "memory", "processes", "output"] = "exit"
    try:
        while True:
            try:
                process.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                count, resident = _used(process.pid)
            if time.monotonic() - began > limits.seconds:
                ended = "time"
            elif count > limits.processes:
                ended = "processes"
            elif resident > limits.memory_mb * MB:
                ended = "memory"
            elif any(reader.full for reader in readers):
                ended = "output"
            if ended != "exit":
                break
    finally:
        process.kill()  # its first child has asked to die with it, and takes the whole process namespace along
        process.wait()
    for reader in readers:
        reader.join(5)
        reader.stream.close()
    if ended == "exit" and any(reader.full for reader in readers):
        ended = "output"
    return Outcome(ended, process.returncode, readers[0].text(), readers[1].text(), time.monotonic() - began)


def _used(parent: int) -> tuple[int, int]:
    """(processes, resident bytes) of all that a process started, directly or not; the sandbox's own three processes are
    not counted.
    """
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
