"""Find input files below a directory and stream the contents of compressed files and archives.

Nothing is unpacked to disk except formats that need random access.

An archive member is named FILE!MEMBER: `books.zip!austen/emma.txt`. Decompressed bytes are metered, so that an archive
bomb is rejected with a reason. Does not parse document formats.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from llmworks.core.documents import RejectedInput

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BROKEN = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)
DEPTH = 3  # maximum nesting of archives


class TooLarge(Exception):
    """A compressed file that expands to more bytes than allowed."""


@dataclass
class ByteMeter:
    """Byte budget of the decompressed contents of one compressed file or archive."""

    limit: int
    used: int = 0

    def count(self, n: int) -> None:
        """Add bytes that were read. TooLarge above the limit."""
        self.used += n
        if self.used > self.limit:
            raise TooLarge(f"expands to more than {self.limit >> 20} MB")


class MeteredStream(io.RawIOBase):
    """A stream whose bytes are counted by a meter. Closing it closes the underlying streams."""

    def __init__(self, meter: ByteMeter, *streams: IO[bytes]) -> None:
        self.meter, self.streams = meter, streams

    def close(self) -> None:
        """Close every layer."""
        if not self.closed:
            for stream in self.streams:
                stream.close()
        super().close()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        data = self.streams[0].read(len(buffer))
        self.meter.count(len(data))
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class InputFile:
    """One file or archive member. `open` returns a fresh stream (for an archive member only once)."""

    name: str
    open: Callable[[], IO[bytes]] = field(repr=False)
    path: Path | None = None  # set for an ordinary, seekable file

    @property
    def suffix(self) -> str:
        """The lowercase suffix that determines the format, without compression suffixes."""
        suffixes = [s.lower() for s in PurePosixPath(self.name.rpartition("!")[2]).suffixes]
        while suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""


def find_files(root: Path, skip: Callable[[Path], bool] = lambda path: False) -> list[Path]:
    """Find every file below a directory (or the file itself), sorted by name, without hidden files and manifests."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return [
        p
        for p in files
        if not _is_hidden(relative_name(root, p)) and relative_name(root, p) != "manifest.json" and not skip(p)
    ]


def relative_name(root: Path, path: Path) -> str:
    """Return a file's name as recorded in documents: its path relative to `root`."""
    return path.relative_to(root.parent if root.is_file() else root).as_posix()


def make_input_file(root: Path, path: Path) -> InputFile:
    """Wrap a file below `root` as a source."""
    return InputFile(relative_name(root, path), lambda: path.open("rb"), path)


def expand_archives(source: InputFile, limit: int, depth: int = 0) -> Iterator[InputFile | RejectedInput]:
    """Yield the source itself, or its contents when it is compressed or an archive.

    `limit`: maximum number of decompressed bytes.
    """
    return _expand_metered(source, ByteMeter(limit), depth)


def _expand_metered(source: InputFile, meter: ByteMeter, depth: int) -> Iterator[InputFile | RejectedInput]:
    name = source.name.lower()
    if name.endswith(COMPRESSED):
        source = _decompress(source, meter)
    if source.suffix not in (".zip", ".tar", ".tgz"):
        yield source
        return
    if depth >= DEPTH:
        yield RejectedInput(source.name, 0, f"archives nested more than {DEPTH} deep")
        return
    members = _zip_members if source.suffix == ".zip" else _tar_members
    try:
        for member in members(source, meter):
            if isinstance(member, RejectedInput):
                yield member
            else:
                yield from _expand_metered(member, meter, depth + 1)
    except TooLarge as error:
        yield RejectedInput(source.name, 0, str(error))
    except BROKEN as error:
        yield RejectedInput(source.name, 0, f"a broken archive ({error})")


def _decompress(source: InputFile, meter: ByteMeter) -> InputFile:
    suffix = PurePosixPath(source.name.lower()).suffix

    def open_stream() -> IO[bytes]:
        raw = source.open()
        stream: Any
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".bz2":
            stream = bz2.BZ2File(raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115
        else:
            import zstandard

            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
        return _open_metered(meter, stream, raw)

    return InputFile(source.name, open_stream)


def _open_metered(meter: ByteMeter, *streams: IO[bytes]) -> IO[bytes]:
    """Wrap streams in a metered, buffered one; the first is read from, the others are closed with it."""
    return io.BufferedReader(MeteredStream(meter, *streams), 1 << 16)


def open_seekable(source: InputFile) -> IO[bytes]:
    """Open a seekable stream: the file itself, or a temporary copy.

    Raises whatever reading the source raises.
    """
    if source.path is not None:
        return source.path.open("rb")
    copy = cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=32 << 20))  # noqa: SIM115
    with source.open() as stream:
        while block := stream.read(1 << 20):
            copy.write(block)
    copy.seek(0)
    return copy


def _zip_members(source: InputFile, meter: ByteMeter) -> Iterator[InputFile | RejectedInput]:
    with open_seekable(source) as stream, zipfile.ZipFile(stream) as archive:
        for info in sorted(archive.infolist(), key=lambda i: i.filename):
            if info.is_dir() or _is_hidden(info.filename):
                continue
            name = f"{source.name}!{info.filename}"
            if info.flag_bits & 1:
                yield RejectedInput(name, 0, "encrypted")
                continue
            yield InputFile(name, lambda info=info: _open_metered(meter, archive.open(info)))  # type: ignore[misc]


def _tar_members(source: InputFile, meter: ByteMeter) -> Iterator[InputFile | RejectedInput]:
    with (
        source.open() as stream,
        tarfile.open(fileobj=stream, mode="r|gz" if source.suffix == ".tgz" else "r|") as archive,
    ):
        for info in archive:
            if not info.isfile() or _is_hidden(info.name):
                continue
            member = archive.extractfile(info)
            if member is not None:
                name = f"{source.name}!{info.name}"
                yield InputFile(name, lambda member=member: _open_metered(meter, member))  # type: ignore[misc]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)
