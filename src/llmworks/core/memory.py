"""Peak memory of the process, and release of freed memory to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


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
