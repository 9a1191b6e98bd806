"""Numbers that lie in a file and are used as if they were in memory. Knows no model."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor


def mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """A file's fp32 numbers [shape], shared: what is written is in the file. Its room on the disk is taken at once: a disk that fills later would kill the process, not raise. OSError when there is none."""
    size = math.prod(shape)
    with file.open("ab") as out:
        if size and out.tell() < 4 * size:
            os.posix_fallocate(out.fileno(), 0, 4 * size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)
