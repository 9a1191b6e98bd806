"""Read tensors of safetensors files as bytes in chunks, and write them sequentially with a digest. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmworks.core.artifact import FileEntry
from llmworks.core.errors import ModelError
from llmworks.model.io.direct_writer import Draft
from llmworks.model.io.weights import check_weights, read_header, weight_files

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Place:
    """Location of a tensor: file, byte offset, number format (safetensors' names) and shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.count * BYTES[self.dtype]


class Shards:
    """The tensors of a directory's safetensors files, read in place.

    ModelError for a broken directory, or an unknown number format.
    """

    def __init__(self, path: Path) -> None:
        check_weights(path)
        self.path = path
        self.places: dict[str, Place] = {}
        self._files: dict[Path, int] = {}
        for file in weight_files(path):
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in read_header(file).items():
                if name == "__metadata__":
                    continue
                if name in self.places:
                    raise ModelError(
                        f"{path}: the tensor {name} is both in {self.places[name].file.name} and in {file.name}"
                    )
                try:
                    place = Place(
                        file,
                        start + int(entry["data_offsets"][0]),
                        str(entry["dtype"]),
                        tuple(int(side) for side in entry["shape"]),
                    )
                    known = (
                        place.dtype in BYTES
                        and min((0, *place.shape)) >= 0
                        and place.size == int(entry["data_offsets"][1]) - int(entry["data_offsets"][0])
                    )
                except (KeyError, TypeError, ValueError, IndexError):
                    raise ModelError(
                        f"{file}: its safetensors header is invalid at {name}; copy or fetch it again"
                    ) from None
                if not known:
                    raise ModelError(
                        f"{file}: {name}: {place.dtype} {list(place.shape)} is an unknown number format, or does not"
                        " match its byte size"
                    )
                self.places[name] = place

    def read(self, name: str, first: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor, starting at element `first`.

        Thread-safe. ModelError where the file ends too early.
        """
        place = self.places[name]
        at, whole = place.start + first * BYTES[place.dtype], len(into)
        if first < 0 or first * BYTES[place.dtype] + whole > place.size:
            raise ModelError(
                f"{self.path}: {name} has {place.count} elements; reading {whole // BYTES[place.dtype]} from element"
                f" {first} is out of range"
            )
        if place.file not in self._files:
            self._files[place.file] = os.open(place.file, os.O_RDONLY)
        done = 0
        while done < whole:
            got = os.preadv(self._files[place.file], [into[done:]], at + done)
            if got <= 0:
                raise ModelError(f"{place.file}: ended while {name} was read; copy or fetch it again")
            done += got

    def close(self) -> None:
        """Close the open files."""
        for number in self._files.values():
            os.close(number)
        self._files.clear()


@dataclass(frozen=True)
class Slot:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A file to write: its name, and its tensors in order."""

    file: str
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        return sum(slot.size for slot in self.slots)

    def header(self) -> bytes:
        """Build the safetensors header."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in self.slots:
            entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [at, at + slot.size]}
            at += slot.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def divided(slots: Sequence[Slot], most: int) -> list[Shard]:
    """Distribute tensors to files of at most `max_bytes` (larger tensors get their own), named as in transformers.

    Within a file the widest number formats come first, so that all are aligned.
    """
    parts: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if parts[-1] and filled + slot.size > most:
            parts.append([])
            filled = 0
        parts[-1].append(slot)
        filled += slot.size
    names = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    )
    return [
        Shard(name, tuple(sorted(part, key=lambda slot: -BYTES[slot.dtype])))
        for name, part in zip(names, parts, strict=True)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Build model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.size for shard in shards)},
        "weight_map": {slot.name: shard.file for shard in shards for slot in shard.slots},
    }


class ShardWriter:
    """Writer of one file from the bytes of its tensors in order; after closing, `entry` has its digest and size.

    The file gets its final name when it is complete.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._target, self._place = folder / shard.file, folder / f".{shard.file}.part"
        header = shard.header()
        self._left, self._size = shard.size, len(header) + shard.size
        self._draft = Draft(self._place, self._size)
        self._digest, self._digester = hashlib.sha256(), ThreadPoolExecutor(1)
        self.entry: FileEntry | None = None
        self._put(header)

    def _put(self, data: bytes | memoryview) -> None:
        """Write and hash in parallel, since both take about as long."""
        digested = self._digester.submit(self._digest.update, data)
        self._draft.write(data)
        digested.result()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._left -= len(data)
        self._put(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._digester.shutdown()
        if kind is not None or self._left:
            self._draft.drop()
            if kind is None:
                raise ModelError(f"{self._target.name}: {self._left} bytes were not written")
            return
        self._draft.finish()
        self._place.replace(self._target)
        self.entry = FileEntry(sha256=self._digest.hexdigest(), bytes=self._size)


def widest(dtypes: Iterable[str]) -> str:
    """Return the number format in which values of several formats are combined, as in torch's type promotion.

    ModelError for integer formats.
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    if not kinds <= set(FLOATS):
        raise ModelError(f"tensors of the number formats {', '.join(sorted(kinds))} cannot be merged")
    return "F64" if "F64" in kinds else "F32"
