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
from llmworks.model.io.direct_writer import DirectWriter
from llmworks.model.io.weights import check_weights, read_header, weight_files

DTYPE_BYTES = {
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
TORCH_DTYPES = {
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
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorLocation:
    """Location of a tensor: file, byte offset, number format (safetensors' names) and shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


class ShardReader:
    """The tensors of a directory's safetensors files, read in place.

    ModelError for a broken directory, or an unknown number format.
    """

    def __init__(self, path: Path) -> None:
        check_weights(path)
        self.path = path
        self.locations: dict[str, TensorLocation] = {}
        self._files: dict[Path, int] = {}
        for file in weight_files(path):
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in read_header(file).items():
                if name == "__metadata__":
                    continue
                if name in self.locations:
                    raise ModelError(
                        f"{path}: the tensor {name} is both in {self.locations[name].file.name} and in {file.name}"
                    )
                try:
                    place = TensorLocation(
                        file,
                        start + int(entry["data_offsets"][0]),
                        str(entry["dtype"]),
                        tuple(int(side) for side in entry["shape"]),
                    )
                    known = (
                        place.dtype in DTYPE_BYTES
                        and min((0, *place.shape)) >= 0
                        and place.num_bytes == int(entry["data_offsets"][1]) - int(entry["data_offsets"][0])
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
                self.locations[name] = place

    def read(self, name: str, first: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor, starting at element `first`.

        Thread-safe. ModelError where the file ends too early.
        """
        place = self.locations[name]
        at, whole = place.offset + first * DTYPE_BYTES[place.dtype], len(into)
        if first < 0 or first * DTYPE_BYTES[place.dtype] + whole > place.num_bytes:
            raise ModelError(
                f"{self.path}: {name} has {place.num_elements} elements; reading {whole // DTYPE_BYTES[place.dtype]}"
                " from element"
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
class TensorSpec:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardSpec:
    """A file to write: its name, and its tensors in order."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(slot.num_bytes for slot in self.tensors)

    def build_header(self) -> bytes:
        """Build the safetensors header."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in self.tensors:
            entries[slot.name] = {
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "data_offsets": [at, at + slot.num_bytes],
            }
            at += slot.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def split_shards(tensors: Sequence[TensorSpec], max_bytes: int) -> list[ShardSpec]:
    """Distribute tensors to files of at most `max_bytes` (larger tensors get their own), named as in transformers.

    Within a file the widest number formats come first, so that all are aligned.
    """
    parts: list[list[TensorSpec]] = [[]]
    filled = 0
    for slot in tensors:
        if parts[-1] and filled + slot.num_bytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(slot)
        filled += slot.num_bytes
    names = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    )
    return [
        ShardSpec(name, tuple(sorted(part, key=lambda slot: -DTYPE_BYTES[slot.dtype])))
        for name, part in zip(names, parts, strict=True)
    ]


def build_index(shards: Sequence[ShardSpec]) -> dict[str, Any]:
    """Build model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {slot.name: shard.file for shard in shards for slot in shard.tensors},
    }


class ShardWriter:
    """Writer of one file from the bytes of its tensors in order; after closing, `entry` has its digest and size.

    The file gets its final name when it is complete.
    """

    def __init__(self, folder: Path, shard: ShardSpec) -> None:
        self._target, self._partial_file = folder / shard.file, folder / f".{shard.file}.part"
        header = shard.build_header()
        self._remaining, self._size = shard.num_bytes, len(header) + shard.num_bytes
        self._writer = DirectWriter(self._partial_file, self._size)
        self._digest, self._digester = hashlib.sha256(), ThreadPoolExecutor(1)
        self.entry: FileEntry | None = None
        self._write_and_hash(header)

    def _write_and_hash(self, data: bytes | memoryview) -> None:
        """Write and hash in parallel, since both take about as long."""
        digested = self._digester.submit(self._digest.update, data)
        self._writer.write(data)
        digested.result()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._remaining -= len(data)
        self._write_and_hash(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._digester.shutdown()
        if kind is not None or self._remaining:
            self._writer.discard()
            if kind is None:
                raise ModelError(f"{self._target.name}: {self._remaining} bytes were not written")
            return
        self._writer.finish()
        self._partial_file.replace(self._target)
        self.entry = FileEntry(sha256=self._digest.hexdigest(), bytes=self._size)


def promote_dtypes(dtypes: Iterable[str]) -> str:
    """Return the number format in which values of several formats are combined, as in torch's type promotion.

    ModelError for integer formats.
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    if not kinds <= set(FLOAT_DTYPES):
        raise ModelError(f"tensors of the number formats {', '.join(sorted(kinds))} cannot be merged")
    return "F64" if "F64" in kinds else "F32"
