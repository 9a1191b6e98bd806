"""Near-duplicate detection with MinHash (Broder 1997) and LSH; candidates are verified by exact Jaccard similarity.

One-permutation hashing (Li, Owen and Zhang 2012) with optimal densification of empty bins (Shrivastava 2017).
Shingles stay on disk, and only one band's hashes are in memory at a time; memory grows with the number of documents,
not with their length.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from llmworks.core.artifact import Config
from llmworks.data.duplicates.clusters import Clusters, group_equal_values
from llmworks.data.text.hashing import Array, TextHashes, mix_bits

SHINGLES, STARTS, BANDS = "shingles.u32", "starts.npy", "bands.npy"
MAX_FULL_BUCKET = 64  # up to this size, all pairs of a bucket are compared; in larger ones, adjacent rows and the first
RECALL = 0.8  # target probability that a pair at the threshold becomes a candidate


class Near(Config):
    """MinHash near-duplicate deduplication."""

    ngram_size: int = Field(5, ge=1, le=50, description="words per shingle (word n-gram)")
    threshold: float = Field(
        0.35,
        gt=0,
        le=1,
        description="minimum Jaccard similarity of the shingle sets; changing one word in ten gives about 0.42",
    )
    num_perm: int = Field(128, ge=16, le=1024, description="MinHash signature size (number of hashes); a power of two")
    hashes_per_bucket: int = Field(
        0, ge=0, description="hashes per LSH band (bucket); 0 = choose for a recall of 0.8 at the threshold"
    )

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.num_perm & (self.num_perm - 1):
            raise ValueError(f"num_perm is {self.num_perm}, it must be a power of two")
        if self.hashes_per_bucket > self.num_perm:
            raise ValueError(f"hashes_per_bucket ({self.hashes_per_bucket}) must not exceed num_perm ({self.num_perm})")
        return self

    @property
    def rows_per_band(self) -> int:
        """Number of hashes per band."""
        return self.hashes_per_bucket or max(
            (r for r in range(1, 17) if candidate_probability(self.threshold, r, self.num_perm // r) >= RECALL),
            default=1,
        )

    @property
    def num_bands(self) -> int:
        """Number of bands."""
        return self.num_perm // self.rows_per_band


def candidate_probability(similarity: float, rows: int, bands: int) -> float:
    """Compute the probability that a pair becomes an LSH candidate: 1 - (1 - s^rows)^bands.

    Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2.
    """
    return float(1 - (1 - similarity**rows) ** bands)


def minhash_signatures(sets: TextHashes, num_perm: int) -> Array:
    """Compute MinHash signatures [texts, permutations] of sorted sets of 32-bit hashes.

    The leading bits select the bin, the rest is the value. A text without shingles has only zeros.
    """
    bits = num_perm.bit_length() - 1
    place = (sets.values >> np.uint32(32 - bits)).astype(np.int64)
    key = sets.owner * num_perm + place
    first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))) if len(key) else np.zeros(0, np.int64)
    flat = np.zeros(len(sets) * num_perm, dtype=np.uint32)
    full = np.zeros(len(flat), dtype=bool)
    flat[key[first]] = sets.values[first] & np.uint32((1 << (32 - bits)) - 1)
    full[key[first]] = True
    return _densify(flat.reshape(-1, num_perm), full.reshape(-1, num_perm))


def _densify(minima: Array, full: Array) -> Array:
    """Densify: give every empty bin the value of a full one, probed in a fixed order for each bin."""
    some: Array = np.any(full, axis=1, keepdims=True)
    empty_row, empty_place = np.nonzero(~full & some)
    for turn in _probe_order(full.shape[1]):
        if not len(empty_row):
            break
        source = turn[empty_place]
        hit = full[empty_row, source]
        minima[empty_row[hit], empty_place[hit]] = minima[empty_row[hit], source[hit]]
        empty_row, empty_place = empty_row[~hit], empty_place[~hit]
    return minima


@functools.cache
def _probe_order(places: int) -> Array:
    """Return, for each attempt, the bin that each bin probes; every bin is probed."""
    random = np.random.Generator(np.random.PCG64(places))
    return np.array(
        [random.permutation(places) for _ in range(4 * places)]
        + [(np.arange(places) + i) % places for i in range(1, places)]
    )


def hash_bands(signature: Array, rows: int) -> Array:
    """Compute a hash for each band [bands, texts]; 0 for texts without shingles."""
    count = signature.shape[1] // rows
    with np.errstate(over="ignore"):
        value = (
            np.arange(1, count + 1, dtype=np.uint64)[:, None]
            * np.uint64(0x9E3779B97F4A7C15)
            * np.ones(len(signature), np.uint64)
        )
        for row in range(rows):
            value = mix_bits(value + signature[:, row : count * rows : rows].T)
    value[:, ~signature.any(axis=1)] = 0
    return value


class ShingleSets:
    """Shingle sets of all rows, read on demand from the parts' files."""

    def __init__(self, folders: Sequence[Path], cache_size: int = 1024) -> None:
        self._starts = [np.load(folder / STARTS) for folder in folders]
        self._first = np.cumsum([0, *(len(starts) - 1 for starts in self._starts)])
        self._files = [os.open(folder / SHINGLES, os.O_RDONLY) for folder in folders]
        self._cache_size, self._cache = cache_size, OrderedDict[int, Array]()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)

    def __getitem__(self, row: int) -> Array:
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        part = int(np.searchsorted(self._first, row, side="right")) - 1
        begin, end = self._starts[part][row - self._first[part] : row - self._first[part] + 2].tolist()
        values = np.frombuffer(os.pread(self._files[part], (end - begin) * 4, begin * 4), dtype=np.uint32)
        self._cache[row] = values
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return values

    def jaccard(self, a: int, b: int) -> float:
        """Compute the Jaccard similarity of two rows."""
        return jaccard(self[a], self[b])


def jaccard(a: Array, b: Array) -> float:
    """Compute the Jaccard similarity of two sorted sets."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate((a, b))
    both.sort()
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)


def cluster_near_duplicates(
    config: Near, folders: Sequence[Path], clusters: Clusters, chosen: Array
) -> tuple[int, int]:
    """Cluster rows whose Jaccard similarity is at least the threshold; returns (pairs compared, pairs joined).

    Only `chosen` rows are considered.
    """
    sets = ShingleSets(folders)
    refused: set[tuple[int, int]] = set()
    compared = joined = 0
    try:
        for band in range(config.num_bands):
            numbers = np.concatenate([np.load(folder / BANDS, mmap_mode="r")[band] for folder in folders])[chosen]
            for group in group_equal_values(numbers):
                for a, b in iter_candidate_pairs(chosen[group].tolist()):
                    if (a, b) in refused or clusters.find(a) == clusters.find(b):
                        continue
                    compared += 1
                    if sets.jaccard(a, b) >= config.threshold:
                        clusters.join(a, b)
                        joined += 1
                    else:
                        refused.add((a, b))
    finally:
        sets.close()
    return compared, joined


def iter_candidate_pairs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a bucket to compare."""
    if len(rows) <= MAX_FULL_BUCKET:
        for i, a in enumerate(rows):
            for b in rows[i + 1 :]:
                yield a, b
        return
    for a, b in pairwise(rows):
        yield a, b
        if a != rows[0]:
            yield rows[0], b
