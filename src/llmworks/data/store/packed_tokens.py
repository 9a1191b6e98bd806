"""Packed tokens on disk: memory-mapped shards, read in a shuffled order that can be resumed.

A shard is a safetensors file: `tokens` of all rows, concatenated; `rows` and `pieces`, the start offsets of rows and
sequences (and the end of the last); `origins`, the input row of each sequence; `learned`, the loss mask, 1 = label
token (missing: all but the first token of a sequence).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError

TYPES = {"U16": "<u2", "U32": "<u4", "U8": "|u1", "I64": "<i8"}


@dataclass(frozen=True)
class PackedRow:
    """One packed row: arrays of token ids, loss mask, position ids that restart at each sequence, and segment ids.

    `origins` has the input row of each sequence.
    """

    ids: Any
    loss_mask: Any
    position_ids: Any
    segment_ids: Any
    origins: Any


@dataclass(frozen=True)
class ReadPosition:
    """Position of a data reader: all readers together have read `row` rows of `epoch`."""

    epoch: int = 0
    row: int = 0


class PackedDataset:
    """A packed dataset: random access to its rows."""

    def __init__(self, dataset: Dataset) -> None:
        import numpy as np

        files = sorted(dataset.path.glob("*.safetensors")) if dataset.path.is_dir() else []
        if not files:
            raise DataError(f"{dataset.path}: has no shards of packed tokens; create them with the stage data.pack")
        self.shards = [map_shard(file) for file in files]
        self._first = np.cumsum([0, *(len(shard["rows"]) - 1 for shard in self.shards)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> PackedRow:
        import numpy as np

        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        shard, row = self.shards[at], number - int(self._first[at])
        begin, end = int(shard["rows"][row]), int(shard["rows"][row + 1])
        low, high = np.searchsorted(shard["pieces"], (begin, end))
        lengths = np.diff(shard["pieces"][low : high + 1])
        segments = np.repeat(np.arange(high - low), lengths)
        positions = np.arange(end - begin) - np.repeat(shard["pieces"][low:high] - begin, lengths)
        learned = shard["learned"][begin:end].astype(bool) if "learned" in shard else positions > 0
        return PackedRow(
            shard["tokens"][begin:end].astype(np.int64), learned, positions, segments, shard["origins"][low:high]
        )


def read_packed(
    packed: PackedDataset,
    seed: int,
    *,
    start: ReadPosition | None = None,
    epochs: int | None = None,
    reader: int = 0,
    readers: int = 1,
) -> Iterator[tuple[ReadPosition, PackedRow]]:
    """Yield rows shuffled by seed and epoch, each with the position to resume from after it.

    Each of several readers gets every `readers`-th row; remaining rows at the end of an epoch are skipped, so that all
    readers get equally many. A position is valid for any number of readers that divides its `row`.
    """
    import numpy as np

    position = start or ReadPosition()
    if len(packed) < readers:
        raise DataError(f"{len(packed)} packed rows are too few for {readers} readers")
    while epochs is None or position.epoch < epochs:
        order = np.random.default_rng([seed, position.epoch]).permutation(len(packed))
        while position.row + readers <= len(packed):
            row = packed[int(order[position.row + reader])]
            position = replace(position, row=position.row + readers)
            yield position, row
        position = ReadPosition(position.epoch + 1)


def collate_packed(rows: Sequence[PackedRow], length: int, pad: int = 0) -> dict[str, Any]:
    """Collate rows into a batch of arrays [rows, length]: input_ids, position_ids, segment_ids, learned (loss mask).

    Padding is a segment of its own (-1) and masked from the loss.
    """
    import numpy as np

    shape = (len(rows), length)
    batch = {
        "input_ids": np.full(shape, pad, np.int64),
        "position_ids": np.zeros(shape, np.int64),
        "segment_ids": np.full(shape, -1, np.int64),
        "learned": np.zeros(shape, bool),
    }
    for i, row in enumerate(rows):
        n = len(row.ids)
        for name, values in (
            ("input_ids", row.ids),
            ("position_ids", row.position_ids),
            ("segment_ids", row.segment_ids),
            ("learned", row.loss_mask),
        ):
            batch[name][i, :n] = values
        batch["position_ids"][i, n:] = np.arange(length - n)
    return batch


def map_shard(path: Path) -> dict[str, Any]:
    """Memory-map the tensors of a shard. DataError for a file that is truncated or of another kind."""
    import numpy as np

    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            if not 8 < begin <= size:
                raise ValueError("its header is truncated")
            header: dict[str, Any] = json.loads(stream.read(begin - 8))
        header.pop("__metadata__", None)
        whole = np.memmap(path, np.uint8, "r")
        tensors = {}
        for name, entry in header.items():
            low, high = (begin + at for at in entry["data_offsets"])
            if high > size:
                raise ValueError(f"it is truncated: {size:,} bytes, {high:,} expected")
            tensors[name] = whole[low:high].view(TYPES[entry["dtype"]])
        if missing := {"tokens", "rows", "pieces", "origins"} - set(tensors):
            raise ValueError(f"it has no {min(missing)!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not a shard of packed tokens ({error}); create it again with the stage data.pack"
        ) from None
    return tensors
