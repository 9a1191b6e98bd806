"""Memory that is no longer needed goes back to the system. Knows nothing of what held it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


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
