"""Vectorized 64-bit word hashes of whole text columns, for deduplication, n-gram overlap and the quality classifier.

A word is a run of letters, digits, marks and symbols, in NFC and lower case; white space and punctuation of all scripts
separate words. Of scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. Its
hash is a polynomial rolling hash of its bytes modulo 2**64 (Karp and Rabin 1987), so one cumulative sum over a column
gives every word's hash as a difference; a finalizer mixes the bits. Hashes are the same on every machine.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from llmworks.core.text.words import SPACELESS

Array = npt.NDArray[Any]
BASE = 0x9E3779B97F4A7C15  # odd, so it is invertible modulo 2**64
PIECE = 1 << 20
INVISIBLE = r"[\x{ad}\x{200b}\x{200e}\x{200f}\x{2060}\x{feff}]+"
SPACELESS_CHARACTER = rf"([{SPACELESS}]\p{{M}}*)"
PART = rf"(?:[0-9A-Za-z]|[^\x00-\x7f\p{{P}}\p{{Z}}{SPACELESS}])"
WORD = regex.compile(rf"[{SPACELESS}]\p{{M}}*|{PART}+")  # a word as it is hashed, in the original text
BLOCK = 1 << 17  # bytes of text hashed together; fits in the CPU cache


@dataclass(frozen=True)
class TextHashes:
    """Hashes of a batch of texts: text `i` has `values[starts[i]:starts[i + 1]]`."""

    values: Array
    starts: Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Array:
        return self.values[self.starts[index] : self.starts[index + 1]]

    @property
    def counts(self) -> Array:
        """Number of hashes of each text."""
        return np.diff(self.starts)

    @property
    def owner(self) -> Array:
        """Index of the text that each hash belongs to."""
        return np.repeat(np.arange(len(self)), self.counts)


@functools.cache
def _byte_tables() -> tuple[Array, Array]:
    """Return (a random number for each byte, 0 for separators; whether a byte is part of a word).

    Uppercase letters have the numbers of lowercase ones.
    """
    random = np.random.Generator(np.random.PCG64(20240601))
    numbers = random.integers(1, 2**63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    inside = np.zeros(256, dtype=bool)
    for first, last in ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x80, 0xFF)):
        inside[first : last + 1] = True
    numbers[0x41:0x5B] = numbers[0x61:0x7B]
    numbers[~inside] = 0
    return numbers, inside


@functools.cache
def _powers(size: int) -> tuple[Array, Array]:
    """Return (BASE**i, BASE**-i) modulo 2**64 for i below `size`."""
    with np.errstate(over="ignore"):
        ups = np.full(size, BASE, dtype=np.uint64)
        downs = np.full(size, pow(BASE, -1, 2**64), dtype=np.uint64)
        ups[0] = downs[0] = 1
        return np.multiply.accumulate(ups), np.multiply.accumulate(downs)


def mix_bits(values: Array) -> Array:
    """Mix the bits of 64-bit hashes (the MurmurHash3 finalizer)."""
    with np.errstate(over="ignore"):
        values = values ^ (values >> np.uint64(33))
        values *= np.uint64(0xFF51AFD7ED558CCD)
        values ^= values >> np.uint64(33)
        values *= np.uint64(0xC4CEB9FE1A85EC53)
        values ^= values >> np.uint64(33)
    return values


def hash_words(column: Any) -> Iterator[TextHashes]:
    """Yield word hashes of a string column (Arrow array or chunked array), a block of rows at a time, in order."""
    import pyarrow as pa

    for chunk in _slice_chunks(column.chunks if isinstance(column, pa.ChunkedArray) else [column]):
        data, offsets = _fold_case(chunk)
        first = 0
        while first < len(chunk):
            # as many rows as fit in a block, at least one
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1)
            last = min(last, len(chunk))
            yield _hash_block(data[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
            first = last


def _slice_chunks(chunks: list[Any]) -> Iterator[Any]:
    """Yield slices of about PIECE bytes, which bounds the copies that case folding makes."""
    for chunk in chunks:
        rows = max(1, PIECE * len(chunk) // max(1, chunk.nbytes))
        for first in range(0, len(chunk), rows):
            yield chunk.slice(first, rows)


@functools.cache
def _separators() -> str:
    """Return a regular expression (RE2) for non-ASCII punctuation and white space."""
    runs: list[list[int]] = []
    for c in range(0x80, 0x110000):
        if unicodedata.category(chr(c))[0] not in "PZ":
            continue
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return "[" + "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in runs) + "]+"


def _fold_case(chunk: Any) -> tuple[Array, Array]:
    """Return (bytes, offsets) of a string array, non-ASCII text folded; the byte table folds ASCII letters."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ascii_rows = pc.string_is_ascii(chunk)
    if not pc.all(ascii_rows).as_py():
        folded = pc.utf8_lower(pc.utf8_normalize(chunk.filter(pc.invert(ascii_rows)), form="NFC"))
        for pattern, replacement in ((INVISIBLE, ""), (_separators(), " "), (SPACELESS_CHARACTER, " \\1 ")):
            folded = pc.replace_substring_regex(folded, pattern, replacement)
        plain = np.asarray(ascii_rows)
        order = np.argsort(np.concatenate((np.flatnonzero(plain), np.flatnonzero(~plain))))
        chunk = pa.concat_arrays([chunk.filter(ascii_rows), folded]).take(pa.array(order))
    chunk = chunk.cast(pa.large_string())
    _, offsets, data = chunk.buffers()
    view = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    return view, np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]


def _hash_block(data: Array, offsets: Array) -> TextHashes:
    numbers, inside = _byte_tables()
    size = 1 << max(17, len(data).bit_length())  # few distinct sizes, so cached powers are reused
    ups, downs = _powers(size)
    part = inside[data]
    begins = part.copy()
    begins[1:] &= ~part[:-1]
    edges = offsets[:-1][offsets[:-1] < len(data)]
    begins[edges] = part[edges]  # a word does not continue into the next text
    ends = part.copy()
    ends[:-1] &= ~part[1:]
    tails = offsets[1:][offsets[1:] > 0] - 1
    ends[tails] = part[tails]
    first, last = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    with np.errstate(over="ignore"):
        running = numbers[data]
        running *= ups[: len(data)]
        np.cumsum(running, out=running)
        below = np.where(first > 0, running[first - 1], np.uint64(0)) if len(first) else np.zeros(0, np.uint64)
        values = (running[last - 1] - below) * downs[first]
    starts = np.searchsorted(first, offsets, side="left")
    return TextHashes(mix_bits(values), starts)


def hash_shingles(words: TextHashes, n: int) -> TextHashes:
    """Hash the word n-grams (shingles) of each text; a text of fewer than `n` words has one shingle of all words."""
    counts = words.counts
    many = np.maximum(counts - n + 1, np.minimum(counts, 1))
    starts = np.concatenate(([0], np.cumsum(many)))
    size = len(words.values) - n + 1
    with np.errstate(over="ignore"):
        full = np.zeros(max(size, 0), dtype=np.uint64)
        for i in range(n):
            full += words.values[i : i + max(size, 0)] * _position_multiplier(i)
        values = np.zeros(starts[-1], dtype=np.uint64)
        long = counts >= n
        owner = words.owner
        if size > 0:
            places = np.flatnonzero(owner[:size] == owner[n - 1 :])
            values[np.repeat(long, many)] = full[places]
        for index in np.flatnonzero((counts > 0) & ~long):
            own = words[int(index)]
            values[starts[index]] = sum((own[i] * _position_multiplier(i) for i in range(len(own))), np.uint64(0))
    return TextHashes(mix_bits(values), starts)


@functools.cache
def _position_multiplier(index: int) -> Any:
    """Return an odd multiplier for a position in a shingle, so that word order matters."""
    return mix_bits(np.array([index * 2 + 1], dtype=np.uint64))[0] | np.uint64(1)


def unique_hashes(hashes: TextHashes) -> TextHashes:
    """Reduce each text's hashes to a sorted set of 32-bit hashes."""
    keys = (hashes.owner.astype(np.uint64) << np.uint64(32)) | (hashes.values >> np.uint64(32))
    keys.sort()
    if len(keys):
        keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))]
    starts = np.searchsorted(keys, np.arange(len(hashes) + 1, dtype=np.uint64) << np.uint64(32))
    return TextHashes(keys.astype(np.uint32), starts)
