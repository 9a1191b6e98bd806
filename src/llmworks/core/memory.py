"""How much memory a process takes at most, and what it no longer needs given back to the system.

Knows nothing of what holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def give_back() -> None:
    """Memory that was held and is not needed now goes back to the system, where the C library can (glibc)."""
    gc.collect()
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    trim()


def trim() -> None:
    """The same for what is free between what is in use, without looking for more: some thousandths of a second."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Memory:
    """The largest resident memory seen, in bytes; 0 where the system does not tell."""

    peak: int = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Memory]:
    """Measure the process's peak resident memory over a block (Linux: VmHWM, reset before)."""
    memory = Memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield memory
    with contextlib.suppress(OSError):
        line = next(
            (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM")),
            "VmHWM: 0 kB",
        )
        memory.peak = int(line.split()[1]) * 1024


def keep_freed() -> None:
    """Have glibc keep blocks of up to 32 MB that are freed, in place of giving them back to the system and asking
    again: of tensors that come and go by the thousand that can take longer than computing them.
    """
    with contextlib.suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(M_MMAP_THRESHOLD, 32 << 20)
        adjust(M_TRIM_THRESHOLD, 256 << 20)
