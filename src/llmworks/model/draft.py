"""A large file that is written from its beginning to its end, past the system's page cache where the file system can: what has to reach the disk anyway is not copied through the memory of all others first. Knows no format."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

ALIGNED = 4096  # where pieces written past the cache begin and end, in the file and in memory
ROOM = 4 << 20  # bytes that are written at a time


class Draft:
    """`size` bytes that are given piece by piece. Nothing is in the file for certain before `finish`. OSError, at once, where the disk has no room for them."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._filled = 0
        self._room = mmap.mmap(-1, ROOM)  # begins at a page
        self._view = memoryview(self._room)
        self._file = self._opened(size >= ROOM)
        self._reserve()

    def _opened(self, past: bool) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if past:
            with contextlib.suppress(OSError):
                return os.open(self._path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        return os.open(self._path, flags, 0o644)

    def _reserve(self) -> None:
        """Ask for the whole room at once: a full disk is known before anything is computed, and writing is cheaper than where the file grows block by block. Not all file systems can."""
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.drop()
                raise OSError(errno.ENOSPC, "no space left", str(self._path.parent)) from error

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
                if error.errno != errno.EINVAL or not self._past():
                    raise
                self._through()
                continue
            left = left[done:]
            if done % ALIGNED:
                self._through()
        self._filled = 0

    def _past(self) -> bool:
        return bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))

    def _through(self) -> None:
        """From here on through the cache."""
        fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))

    def finish(self) -> None:
        """Write the rest; the file is on the disk."""
        self._through()
        self._flush(self._filled)
        os.fsync(self._file)
        self._close()

    def drop(self) -> None:
        """Leave nothing behind."""
        self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._view.release()
        self._room.close()
        os.close(self._file)
