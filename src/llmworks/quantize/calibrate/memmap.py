"""Memory-mapped tensors in files. Does not know models."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path

import torch
from torch import Tensor


def open_memmap(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Open a file's fp32 values [shape] as a shared tensor: writes go to the file.

    Disk space is allocated upfront: a disk that fills up later would kill the process instead of raising. OSError if
    there is not enough.
    """
    size = math.prod(shape)
    with file.open("ab") as out:
        if size and out.tell() < 4 * size:
            os.posix_fallocate(out.fileno(), 0, 4 * size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)


def release(*tensors: Tensor | None) -> None:
    """Release mapped tensors from the process's memory; their values stay in the file and are read again on access."""
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                advise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4 * tensor.numel()), 4)  # MADV_DONTNEED
