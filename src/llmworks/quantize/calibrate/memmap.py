"""Numbers that lie in a file and are used as if they were in memory. Knows no model."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path

import torch
from torch import Tensor


def mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """A file's fp32 numbers [shape], shared: what is written is in the file.

    Its room on the disk is taken at once: a disk that fills later would kill the process, not raise. OSError when there
    is none.
    """
    size = math.prod(shape)
    with file.open("ab") as out:
        if size and out.tell() < 4 * size:
            os.posix_fallocate(out.fileno(), 0, 4 * size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)


def release(*tensors: Tensor | None) -> None:
    """Whole mapped tensors leave the process's memory; their numbers stay in the file, and are read again when they are
    asked for.
    """
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                advise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4 * tensor.numel()), 4)  # MADV_DONTNEED
