"""Programs that try to get out of the sandbox, to see the host, or to use it up.

Every one of them must fail, and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmworks.core.errors import MissingDependency, UserError
from llmworks.sandbox import Limits, bubblewrap, run, run_python
from llmworks.sandbox.seccomp import ARCHITECTURES, DENIED, filter_program

CALLS = "import ctypes\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
SECRET = "canary-7f1d"

# each prints ESCAPED when it succeeds
READS = {
    "the host's users": "print('ESCAPED' if 'root' in open('/etc/passwd').read() else '')",
    "the host's shadow file": "print('ESCAPED', open('/etc/shadow').read())",
    "a file of the user": "print('ESCAPED', open('{canary}').read())",
    "a file of the user, through the interpreter's own path": (
        "import sys, os; p = os.path.join(sys.prefix, os.path.relpath('{canary}', sys.prefix)); print('ESCAPED',"
        " open(p).read())"
    ),
    "the host's root directory": (
        "import os; print('ESCAPED' if set(os.listdir('/')) & {{'home', 'var', 'srv', 'opt', 'mnt'}} else '')"
    ),
    "the environment": "import os; print('ESCAPED' if '{secret}' in str(dict(os.environ)) else '')",
    "the environment of other processes": (
        "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n    try:\n        if b'{secret}' in open(p,"
        " 'rb').read(): print('ESCAPED')\n    except OSError: pass"
    ),
    "other processes": "import glob; print('ESCAPED' if len(glob.glob('/proc/[0-9]*')) > 4 else '')",
    "the process outside": (
        "import os; os.kill({parent}, 0); print('ESCAPED' if open('/proc/{parent}/stat').read() else '')"
    ),
    "open files of the process outside": (
        "import os; print('ESCAPED' if set(os.listdir('/proc/self/fd')) - {{'0', '1', '2', '3'}} else '')"
    ),
    "the kernel's memory": "print('ESCAPED', open('/proc/kcore', 'rb').read(16))",
    "the kernel's log": (
        CALLS + "b = ctypes.create_string_buffer(100); print('ESCAPED' if call({syslog}, 3, b, 100) > 0 else '')"
    ),
    "a disk": (
        "import glob; print('ESCAPED' if any(open(p, 'rb').read(1) for p in glob.glob('/dev/[svn][dv]*')) else '')"
    ),
    "shared memory of the host": "import os; print('ESCAPED' if os.listdir('/dev/shm') else '')",
}
WRITES = {
    "the system's programs": "open('/usr/bin/evil', 'w'); print('ESCAPED')",
    "the interpreter": "import sys; open(sys.prefix + '/evil', 'w'); print('ESCAPED')",
    "the root directory": "open('/evil', 'w'); print('ESCAPED')",
    "a device directory": "open('/dev/evil', 'w'); print('ESCAPED')",
    "the kernel's settings": "open('/proc/sys/kernel/core_pattern', 'w').write('|/box/evil'); print('ESCAPED')",
    "the kernel's trigger": "open('/proc/sysrq-trigger', 'w').write('h'); print('ESCAPED')",
    "a link to the host": "import os; os.symlink('{canary}', 'l'); open('l', 'a').write('x'); print('ESCAPED')",
    "a hard link to the system": "import os; os.link('/usr/bin/env', '/box/env'); print('ESCAPED')",
    "a device": "import os, stat; os.mknod('/box/mem', stat.S_IFCHR | 0o666, os.makedev(1, 1)); print('ESCAPED')",
}
POWERS = {
    "the network": "import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('ESCAPED')",
    "a name server": "import socket; socket.getaddrinfo('example.org', 80); print('ESCAPED')",
    "a raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "an abstract socket of the host": (
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0{abstract}'); print('ESCAPED')"
    ),
    "to be root": "import os; os.setuid(0); print('ESCAPED')",
    "a capability": (
        "print('ESCAPED' if int([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1], 16)"
        " else '')"
    ),
    "new privileges": "print('' if 'NoNewPrivs:\\t1' in open('/proc/self/status').read() else 'ESCAPED')",
    "a user namespace": (
        "import subprocess; print('ESCAPED' if subprocess.run(['unshare', '-Ur', 'true']).returncode == 0 else '')"
    ),
    "a user namespace by clone": (
        CALLS + "import os\nif call({clone}, 0x10000000 | 17, 0, 0, 0, 0) >= 0: os.write(1, b'ESCAPED')"
    ),
    "to mount": CALLS + "print('ESCAPED' if call({mount}, b'none', b'/tmp', b'tmpfs', 0, 0) == 0 else '')",
    "to trace": CALLS + "print('ESCAPED' if call({ptrace}, 0, 0, 0, 0) == 0 else '')",
    "io_uring": CALLS + "b = ctypes.create_string_buffer(120); print('ESCAPED' if call(425, 8, b) >= 0 else '')",
    "bpf": CALLS + "b = ctypes.create_string_buffer(120); print('ESCAPED' if call({bpf}, 0, b, 120) >= 0 else '')",
    "keys": CALLS + "print('ESCAPED' if call({keyctl}, 0, -3, 1) > 0 else '')",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('ESCAPED')",
    "the terminal": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x'); print('ESCAPED')",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Things on the host that could be reached: a file, a listening port, an abstract socket, a variable."""
    canary = tmp_path_factory.mktemp("host") / "canary"
    canary.write_text(SECRET)
    server = socket.create_server(("127.0.0.1", 0))
    abstract = f"llmworks-{os.getpid()}"
    local = socket.socket(socket.AF_UNIX)
    local.bind("\0" + abstract)
    local.listen()
    os.environ["LLMWORKS_TEST_KEY"] = SECRET
    socket.create_connection(server.getsockname(), 2).close()  # it can be reached from here
    column = ARCHITECTURES[platform.machine()][0]
    numbers = {name: pair[column] for name, pair in DENIED.items()}
    values = {
        "canary": canary,
        "port": server.getsockname()[1],
        "abstract": abstract,
        "secret": SECRET,
        "parent": os.getpid(),
    }
    yield {**numbers, **values, "clone": (56, 220)[column]}
    server.close()
    local.close()
    del os.environ["LLMWORKS_TEST_KEY"]


def sandboxed(program: str, host: dict[str, object], **limits: float) -> bubblewrap.SandboxResult:
    return run_python(program.format(**host), limits=Limits(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", [*READS, *WRITES, *POWERS])
def test_no_escape(what: str, host: dict[str, object]) -> None:
    program = (READS | WRITES | POWERS)[what]
    outcome = sandboxed(program, host)
    assert outcome.stop_reason == "exit"
    assert "ESCAPED" not in outcome.stdout
    assert Path(str(host["canary"])).read_text() == SECRET


@pytest.mark.parametrize(
    "what",
    [
        "a file of the user",
        "the environment",
        "other processes",
        "the network",
        "an abstract socket of the host",
        "the root directory",
        "a link to the host",
        "new privileges",
    ],
)
def test_the_attempts_would_succeed_outside(what: str, host: dict[str, object], tmp_path: Path) -> None:
    """The attempts are real ones: without the sandbox they get through."""
    program = (READS | WRITES | POWERS)[what].format(**host)
    done = subprocess.run(
        [sys.executable, "-c", program.replace("'/evil'", f"'{tmp_path}/evil'")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    Path(str(host["canary"])).write_text(SECRET)
    assert "ESCAPED" in done.stdout


BOMBS = {
    "forks": ("import os\nwhile True: os.fork()", {"processes"}),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {"exit", "memory"}),
    "memory of many": (
        (
            "import os, time\nfor _ in range(8):\n    if not os.fork(): x = b'x' * (60 << 20);"
            " time.sleep(30)\ntime.sleep(30)"
        ),
        {"memory"},
    ),
    "output": ("while True: print('x' * 1000)", {"output"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "time": (
        (
            "import signal, time\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s,"
            " signal.SIG_IGN)\ntime.sleep(60)"
        ),
        {"time"},
    ),
    "processor": ("while True: pass", {"time", "exit"}),
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_is_used_up_ends(what: str) -> None:
    program, ends = BOMBS[what]
    outcome, mark = marked(program, Limits(seconds=2, memory_mb=256, processes=16))
    assert outcome.stop_reason in ends
    assert not outcome.ok
    assert outcome.seconds < 8
    assert len(outcome.stdout) <= 1 << 20
    assert left(mark) == set()


def test_files_have_room_but_not_for_all() -> None:
    program = """
import os
for place in ("/box", "/tmp", "/dev/shm"):
    size = 0
    try:
        for n in range(100):
            with open(f"{place}/f{n}", "wb") as stream:
                stream.write(b"x" * (1 << 20)); size += 1
    except OSError as error:
        print(place, size, error.strerror)
"""
    outcome = run_python(program, limits=Limits(disk_mb=8))
    assert [line.split(" ", 2)[0] for line in outcome.stdout.splitlines()] == ["/box", "/tmp", "/dev/shm"]
    assert all(int(line.split()[1]) <= 8 and "No space left" in line for line in outcome.stdout.splitlines())


def test_a_process_that_hides_ends_too() -> None:
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.close(1);"
        " os.close(2); time.sleep(60)\nelse: print('done')"
    )
    outcome, mark = marked(program, Limits(seconds=4))
    assert outcome.stdout == "done\n"
    assert left(mark) == set()


def test_what_is_left_would_be_seen() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", mark], stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()  # only now its command line is its own
    try:
        assert left(mark, moments=1) == {process.pid}
    finally:
        process.kill()
        process.communicate()


def marked(program: str, limits: Limits) -> tuple[bubblewrap.SandboxResult, str]:
    """Run a program whose processes carry a mark in their command line: other tests have sandboxes of their own
    meanwhile.
    """
    mark = uuid.uuid4().hex
    words = [str(Path(sys.base_prefix) / "bin" / "python3"), "-B", "-E", "-s", "main.py", mark]
    return run(words, files={"main.py": program}, limits=limits, readable_paths=[Path(sys.base_prefix)]), mark


def left(mark: str, moments: int = 50) -> set[int]:
    """Processes with the mark that still run, after a moment to go."""
    for _ in range(moments):
        alive = set()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (place / "cmdline").read_bytes().decode(errors="replace"):
                    alive.add(int(place.name))
        if not alive:
            return set()
        time.sleep(0.05)
    return alive


def test_programs_run() -> None:
    outcome = run_python(
        "import helper, sys; print(helper.f(int(input()))); sys.exit(3)",
        files={"helper.py": "def f(x): return x * 2"},
        stdin="21",
    )
    assert (outcome.stop_reason, outcome.exit_code, outcome.stdout, outcome.stderr) == ("exit", 3, "42\n", "")
    outcome = run(["sh", "-c", "cat data/a.txt; kill -9 $$"], files={"data/a.txt": "ä".encode()})
    assert (outcome.exit_code, outcome.stdout) == (137, "ä")


def test_many_at_once() -> None:
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(run_python(f"print({i} ** 2)").stdout)) for i in range(8)
    ]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=int) == [f"{i * i}\n" for i in range(8)]


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_files_stay_inside(name: str) -> None:
    with pytest.raises(UserError, match="relative path"):
        run_python("", files={name: "x"})


def test_without_bubblewrap_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bubblewrap.require_bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="apt-get install bubblewrap"):
        run_python("print(1)")
    false = tmp_path / "bwrap"
    false.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    false.chmod(0o755)
    with pytest.raises(MissingDependency, match="No permissions to create new namespace"):
        run_python("print(1)")
    monkeypatch.undo()
    bubblewrap.require_bubblewrap.cache_clear()
    assert shutil.which("bwrap")


def test_the_filter_knows_two_machines() -> None:
    for machine in ARCHITECTURES:
        assert len(filter_program(machine)) == 8 * (len(DENIED) + 7)
    assert filter_program("riscv64") == b""
