"""A large file that is written from its beginning to its end, past the system's page cache where the file system can:
what has to reach the disk anyway is not copied through the memory of all others first.

Knows no format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
from pathlib import Path

ALIGNED = 4096  # where pieces written past the cache begin and end, in the file and in memory
ROOM = 4 << 20  # bytes that are written at a time
DIRECT = getattr(os, "O_DIRECT", 0)


class Draft:
    """`size` bytes that are given piece by piece.

    Nothing is in the file for certain before `finish`. OSError, at once, where the disk has no room for them.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._filled = 0
        self._room = mmap.mmap(-1, ROOM)  # begins at a page
        self._view = memoryview(self._room)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._reserve()
        if size >= ROOM:
            self._past(True)

    def _reserve(self) -> None:
        """Ask for the whole room at once: a full disk is known before anything is computed, and writing is cheaper than
        where the file grows block by block.

        Not all file systems can.
        """
        try:
            if (
                shutil.disk_usage(self._path.parent).free < self._size
            ):  # asked before: a file system may take all that it has before it finds that it is too little
                raise OSError(errno.ENOSPC, "no space left")
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.drop()
                raise OSError(
                    error.errno,
                    "no space left" if error.errno != errno.EFBIG else "a file may not be so large here",
                    str(self._path.parent),
                ) from error

    def _past(self, wanted: bool) -> bool:
        """Write past the cache from here on, or through it; whether that is another way than before."""
        before = fcntl.fcntl(self._file, fcntl.F_GETFL)
        after = before | DIRECT if wanted else before & ~DIRECT
        with contextlib.suppress(OSError):  # a file system that only writes through its cache
            fcntl.fcntl(self._file, fcntl.F_SETFL, after)
        return after != before

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        left = memoryview(data)
        while left:
            count = min(len(left), ROOM - self._filled)
            self._view[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == ROOM:
                self._flush(ROOM)

    def _flush(self, count: int) -> None:
        """Write what has been gathered."""
        left = self._view[:count]
        while left:
            try:
                done = os.write(self._file, left)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._past(False):
                    raise
                continue
            left = left[done:]
            if done % ALIGNED:
                self._past(False)
        self._filled = 0

    def finish(self) -> None:
        """Write the rest; the file is on the disk."""
        self._past(False)
        self._flush(self._filled)
        os.fsync(self._file)
        self._close()

    def drop(self) -> None:
        """Leave nothing behind."""
        self._path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        os.close(self._file)
        with contextlib.suppress(
            BufferError
        ):  # a write that failed still looks at it, as long as its error is being told
            self._view.release()
            self._room.close()
