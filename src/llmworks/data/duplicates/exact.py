"""Exact deduplication: identical bytes, or identical words regardless of case, whitespace and punctuation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import MissingDependency
from llmworks.data.text.hashing import Array, TextHashes, mix_bits


class Exact(Config):
    """Exact deduplication."""

    match: Literal["words", "bytes"] = Field(
        "words", description="words: ignore case, whitespace and punctuation; bytes: require identical bytes"
    )


def hash_texts(column: Any) -> Array:
    """Compute a 64-bit hash (xxh3) of each text's bytes, 0 for an empty text. MissingDependency without the extra."""
    import pyarrow as pa

    try:
        from xxhash import xxh3_64_digest
    except ImportError:
        raise MissingDependency(
            "data.dedup hashes with xxhash; install it with: pip install 'llmworks[corpus]'"
        ) from None
    found: list[Array] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        _, offsets, data = chunk.buffers()
        places = np.frombuffer(offsets, dtype=np.int64 if pa.types.is_large_string(chunk.type) else np.int32)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ]
        view = memoryview(data if data is not None else b"")
        ends = places.tolist()
        digests = b"".join([xxh3_64_digest(view[begin:end]) for begin, end in pairwise(ends)])
        numbers = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
        numbers[places[1:] == places[:-1]] = 0
        found.append(numbers)
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def hash_sequences(words: TextHashes) -> Array:
    """Compute a 64-bit hash of each text's word sequence, 0 for a text without words."""
    place = np.arange(len(words.values), dtype=np.uint64) - np.repeat(words.starts[:-1], words.counts).astype(np.uint64)
    with np.errstate(over="ignore"):
        total = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mix_bits(words.values + mix_bits(place)))))
        values = mix_bits(total[words.starts[1:]] - total[words.starts[:-1]] + words.counts.astype(np.uint64))
    return np.where(words.counts > 0, values | np.uint64(1), np.uint64(0))
