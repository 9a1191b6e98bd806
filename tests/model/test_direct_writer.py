"""Files that are written past the page cache: the same bytes as ever, wherever pieces end and whatever the file system
takes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path
from typing import Any

import pytest

from llmworks.model.io import direct_writer as draft
from llmworks.model.io.direct_writer import ALIGNMENT, BUFFER_SIZE, DirectWriter

SIZES = [
    0,
    1,
    ALIGNMENT,
    BUFFER_SIZE - 1,
    BUFFER_SIZE,
    BUFFER_SIZE + 1,
    2 * BUFFER_SIZE,
    2 * BUFFER_SIZE + ALIGNMENT,
    3 * BUFFER_SIZE + 5,
]


def written(path: Path, size: int) -> bytes:
    """Write so many bytes in pieces of odd sizes."""
    source = random.Random(size)
    content = source.randbytes(size)
    made, at = DirectWriter(path, size), 0
    while at < size:
        step = source.choice([1, 7, ALIGNMENT, 100_003, BUFFER_SIZE, BUFFER_SIZE + 9])
        made.write(memoryview(content)[at : at + step])
        at += step
    made.finish()
    return content


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_there(size: int, tmp_path: Path) -> None:
    content = written(tmp_path / "f", size)
    assert (tmp_path / "f").read_bytes() == content


def test_a_file_system_that_only_writes_through_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = fcntl.fcntl, []

    def set_flags(file: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL:
            asked.append(bool(flags & os.O_DIRECT))
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "not here")
        return real(file, command, flags)

    monkeypatch.setattr(draft.fcntl, "fcntl", set_flags)
    content = written(tmp_path / "f", 2 * BUFFER_SIZE + 1)
    assert (tmp_path / "f").read_bytes() == content
    assert asked[0] is True


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its error is being told, the file is gone already."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = DirectWriter(tmp_path / "f", 2 * BUFFER_SIZE)
    monkeypatch.setattr(draft.os, "write", full)
    with pytest.raises(OSError, match="No space left") as found:
        made.write(bytes(BUFFER_SIZE))
    made.discard()  # `found` holds the failed write's own variables
    assert not (tmp_path / "f").exists()
    assert found.value.errno == errno.ENOSPC


def test_a_disk_that_wants_other_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write past the cache that is refused, and one that ends between two sectors: the rest goes through the
    cache.
    """
    real = os.write
    for first in ("refused", "short"):
        calls: list[int] = []

        def write(file: int, data: Any, first: str = first, calls: list[int] = calls) -> int:
            calls.append(len(data))
            if len(calls) == 1 and first == "refused":
                raise OSError(errno.EINVAL, "not aligned")
            if len(calls) == 1:
                fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
                return real(file, data[:1001])
            return real(file, data)

        monkeypatch.setattr(draft.os, "write", write)
        content = written(tmp_path / first, 2 * BUFFER_SIZE + 77)
        assert (tmp_path / first).read_bytes() == content
        assert calls[:2] == [BUFFER_SIZE, BUFFER_SIZE if first == "refused" else BUFFER_SIZE - 1001]


def test_what_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    made = DirectWriter(tmp_path / "f", 2 * BUFFER_SIZE)
    made.write(bytes(BUFFER_SIZE + 1))
    made.discard()
    assert not (tmp_path / "f").exists()


def test_a_disk_without_room_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is asked of it, which would take the room of others for a moment."""
    monkeypatch.setattr(draft.os, "posix_fallocate", lambda *_: pytest.fail("the disk was asked"))
    with pytest.raises(OSError, match="no space left") as found:
        DirectWriter(tmp_path / "f", 1 << 60)
    assert found.value.errno == errno.ENOSPC
    assert not (tmp_path / "f").exists()
