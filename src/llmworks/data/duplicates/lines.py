"""Line deduplication: lines repeated across documents (menus, licenses, signatures) are kept only where they first
occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.text.hashing import Array

LINES = "lines.npy"
PAIR = np.dtype([("number", np.uint64), ("row", np.int64)])
SLICE = 20_000_000  # pairs sorted in memory at a time


class Lines(Config):
    """Line or paragraph deduplication."""

    paragraphs: bool = Field(False, description="deduplicate paragraphs (separated by empty lines) instead of lines")
    min_characters: int = Field(30, ge=1, description="keep shorter lines")
    max_document_frequency: int = Field(
        3, ge=1, description="a line in more documents is kept only in the first of them"
    )
    min_remaining_characters: int = Field(50, ge=0, description="drop documents with fewer characters left")


def hash_lines(config: Lines, text: str) -> list[int]:
    """Compute a 64-bit hash of each line that is long enough, 0 for others."""
    from xxhash import xxh3_64_intdigest

    return [
        xxh3_64_intdigest(key.encode()) if len(key := line.strip()) >= config.min_characters else 0
        for line in split_lines(config, text)
    ]


def split_lines(config: Lines, text: str) -> list[str]:
    """Split a text into lines or paragraphs."""
    return text.split("\n\n" if config.paragraphs else "\n")


def find_repeated_lines(config: Lines, folders: Sequence[Path]) -> tuple[Array, Array]:
    """Find repeated lines in the parts' (hash, row) files; returns (sorted hashes, the first row of each)."""
    parts = [np.load(folder / LINES, mmap_mode="r") for folder in folders]
    slices = 1 + sum(map(len, parts)) // SLICE
    numbers: list[Array] = []
    rows: list[Array] = []
    for piece in range(slices):
        pairs = np.concatenate([part[part["number"] % slices == piece] for part in parts])
        pairs.sort(order=("number", "row"))
        edges = np.flatnonzero(np.concatenate(([True], pairs["number"][1:] != pairs["number"][:-1], [True])))
        often = edges[:-1][np.diff(edges) > config.max_document_frequency]
        numbers.append(pairs["number"][often])
        rows.append(pairs["row"][often])
    found, first = np.concatenate(numbers), np.concatenate(rows)
    order = np.argsort(found)
    return found[order], first[order]


def remove_repeated_lines(config: Lines, text: str, row: int, repeated: Array, first: Array) -> tuple[str, list[str]]:
    """Remove lines that first occur in another row; returns (remaining text, removed lines)."""
    numbers = hash_lines(config, text)
    places = np.minimum(np.searchsorted(repeated, np.array(numbers, dtype=np.uint64)), len(repeated) - 1).tolist()
    kept: list[str] = []
    out: list[str] = []
    for line, number, place in zip(split_lines(config, text), numbers, places, strict=True):
        (out if number and repeated[place] == number and first[place] != row else kept).append(line)
    return ("\n\n" if config.paragraphs else "\n").join(kept), out
