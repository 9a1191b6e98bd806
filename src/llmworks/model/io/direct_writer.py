"""Write a large file sequentially, bypassing the page cache (O_DIRECT) where the file system supports it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
from pathlib import Path

ALIGNMENT = 4096  # alignment of O_DIRECT writes, in the file and in memory
BUFFER_SIZE = 4 << 20  # bytes per write
O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """A file of `size` bytes that is written piece by piece.

    Nothing is guaranteed to be on disk before `finish`. OSError on creation when the disk has too little space.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._filled = 0
        self._buffer = mmap.mmap(-1, BUFFER_SIZE)  # page-aligned
        self._view = memoryview(self._buffer)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._preallocate()
        if size >= BUFFER_SIZE:
            self._set_direct(True)

    def _preallocate(self) -> None:
        """Preallocate the file: a full disk is noticed early, and writing is cheaper than growing block by block.

        Not all file systems support it.
        """
        try:
            if (
                shutil.disk_usage(self._path.parent).free < self._size
            ):  # checked first: a file system may fill up before fallocate fails
                raise OSError(errno.ENOSPC, "no space left")
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.discard()
                raise OSError(
                    error.errno,
                    "no space left" if error.errno != errno.EFBIG else "file too large for this file system",
                    str(self._path.parent),
                ) from error

    def _set_direct(self, wanted: bool) -> bool:
        """Switch O_DIRECT on or off from here on; return whether it changed."""
        before = fcntl.fcntl(self._file, fcntl.F_GETFL)
        after = before | O_DIRECT if wanted else before & ~O_DIRECT
        with contextlib.suppress(OSError):  # file systems without O_DIRECT
            fcntl.fcntl(self._file, fcntl.F_SETFL, after)
        return after != before

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data)
        while left:
            count = min(len(left), BUFFER_SIZE - self._filled)
            self._view[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == BUFFER_SIZE:
                self._flush(BUFFER_SIZE)

    def _flush(self, count: int) -> None:
        """Write the buffered bytes."""
        left = self._view[:count]
        while left:
            try:
                done = os.write(self._file, left)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._set_direct(False):
                    raise
                continue
            left = left[done:]
            if done % ALIGNMENT:
                self._set_direct(False)
        self._filled = 0

    def finish(self) -> None:
        """Write the rest and sync the file to disk."""
        self._set_direct(False)
        self._flush(self._filled)
        os.fsync(self._file)
        self._close()

    def discard(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        os.close(self._file)
        with contextlib.suppress(BufferError):  # a failed write still references the view while its error is handled
            self._view.release()
            self._buffer.close()
