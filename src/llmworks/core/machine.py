"""The machine under the process: its description, threads, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmworks.core.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
SPIN_COUNT = 1000  # turns of a waiting thread, about 20 µs


def describe_machine() -> dict[str, str]:
    """Return system, architecture and processor."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        line = next(
            (text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")), ""
        )
        processor = line.partition(":")[2].strip() or processor
    return {"system": platform.system(), "machine": platform.machine(), "processor": processor}


def get_thread_count() -> int:
    """Return the number of threads for tensor operations: `$LLMWORKS_THREADS`, else all cores."""
    value = os.environ.get("LLMWORKS_THREADS", "")
    if value and (not value.isdecimal() or not int(value)):
        raise UserError(f"LLMWORKS_THREADS is {value!r}, it must be a positive integer")
    return int(value) if value else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Set torch's number of threads, whether or not torch is imported already."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def bound_spinning() -> None:
    """Let waiting threads of OpenMP sleep early, unless the user's environment says how they wait.

    Threads wait for each other after every tensor operation. By default they spin for milliseconds, and beside another
    busy process they take the core from the thread that they wait for. libgomp reads the variable when torch is
    imported. benchmarks/threads.py compares the ways to wait.
    """
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def release_memory() -> None:
    """Return unused memory to the operating system, where the C library can (glibc)."""
    gc.collect()
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    trim_heap()


def trim_heap() -> None:
    """Return free heap memory to the operating system without a garbage collection; takes a few milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class PeakMemory:
    """Peak resident memory, in bytes; 0 where the system does not report it."""

    peak: int = 0


@contextlib.contextmanager
def track_peak_memory() -> Iterator[PeakMemory]:
    """Measure the process's peak resident memory over a block (Linux: VmHWM, reset before)."""
    memory = PeakMemory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield memory
    with contextlib.suppress(OSError):
        line = next(
            (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM")),
            "VmHWM: 0 kB",
        )
        memory.peak = int(line.split()[1]) * 1024


def retain_freed_blocks() -> None:
    """Let glibc keep freed blocks of up to 32 MB instead of returning them to the operating system.

    With thousands of short-lived tensors, returning and requesting memory can take longer than computing them.
    """
    with contextlib.suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(M_MMAP_THRESHOLD, 32 << 20)
        adjust(M_TRIM_THRESHOLD, 256 << 20)
