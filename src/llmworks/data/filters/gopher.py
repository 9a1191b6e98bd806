"""The quality and repetition rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1.1 and table A1).

Decisions are those of datatrove's GopherQualityFilter and GopherRepetitionFilter. Repetition is first bounded from
above for a whole batch with sorted n-gram hashes; only the texts that come near a threshold are counted n-gram by
n-gram.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.filters.rules import Bound, Judgement, judge, share
from llmworks.data.filters.words import Array, Batch, Words

Runs = tuple[Array, Array]
PARAGRAPHS = re.compile(r"\n{2,}")


class GopherQuality(Config):
    """Gopher's quality rules."""

    min_doc_words: int = Field(50, ge=0, description="words that are not only symbols, at least")
    max_doc_words: int = Field(100_000, gt=0, description="words that are not only symbols, at most")
    min_avg_word_length: float = Field(3, ge=0, description="mean length of those words, at least")
    max_avg_word_length: float = Field(10, gt=0, description="mean length of those words, at most")
    max_symbol_word_ratio: float = Field(0.1, ge=0, description="hash signs per word, and ellipses per word, at most")
    max_bullet_lines_ratio: float = Field(0.9, ge=0, description="share of lines that begin with a bullet, at most")
    max_ellipsis_lines_ratio: float = Field(0.3, ge=0, description="share of lines that end with an ellipsis, at most")
    min_alpha_words_ratio: float = Field(0.8, ge=0, description="share of words with a letter, at least")
    min_stop_words: int = Field(2, ge=0, description="how many of the, be, to, of, and, that, have, with must occur")


class GopherRepetition(Config):
    """Gopher's repetition rules: shares of the text's lines, paragraphs and characters, at most."""

    dup_line_frac: float = Field(0.3, ge=0, description="lines that occurred before")
    dup_para_frac: float = Field(0.3, ge=0, description="paragraphs that occurred before")
    dup_line_char_frac: float = Field(0.2, ge=0, description="characters in lines that occurred before")
    dup_para_char_frac: float = Field(0.2, ge=0, description="characters in paragraphs that occurred before")
    top_2_grams: float = Field(0.2, ge=0, description="characters in the most frequent 2-gram of words")
    top_3_grams: float = Field(0.18, ge=0, description="characters in the most frequent 3-gram")
    top_4_grams: float = Field(0.16, ge=0, description="characters in the most frequent 4-gram")
    dup_5_grams: float = Field(0.15, ge=0, description="characters in 5-grams that occurred before")
    dup_6_grams: float = Field(0.14, ge=0, description="characters in 6-grams that occurred before")
    dup_7_grams: float = Field(0.13, ge=0, description="characters in 7-grams that occurred before")
    dup_8_grams: float = Field(0.12, ge=0, description="characters in 8-grams that occurred before")
    dup_9_grams: float = Field(0.11, ge=0, description="characters in 9-grams that occurred before")
    dup_10_grams: float = Field(0.1, ge=0, description="characters in 10-grams that occurred before")


def gopher_quality(config: GopherQuality, batch: Batch, words: Words) -> Judgement:
    """Apply the quality rules to a batch."""
    ids, count = batch.ids, batch.counts
    real = words.symbol[ids] == 0
    real_count = batch.sums(real)
    length = share(batch.sums(np.where(real, words.length[ids], 0)), real_count)
    length[real_count == 0] = np.nan  # no mean, no decision
    stops = np.zeros(len(batch.texts))
    flags = words.stop[ids]
    for bit in range(8):
        stops += batch.sums(flags & (1 << bit)) > 0
    marks = [_marks(text) for text in batch.texts]
    hashes, ellipses, bullets, trailing = (np.array(column, dtype=float) for column in zip(*marks, strict=True))
    c = config
    return judge(
        len(batch.texts),
        [
            Bound("gopher: too few words", "words", real_count, 2000, low=c.min_doc_words),
            Bound("gopher: too many words", "words", real_count, 2000, high=c.max_doc_words),
            Bound("gopher: words too short", "mean word length", length, 12, low=c.min_avg_word_length),
            Bound("gopher: words too long", "mean word length", length, 12, high=c.max_avg_word_length),
            Bound("gopher: hash signs", "hash signs per word", share(hashes, count), 0.2, high=c.max_symbol_word_ratio),
            Bound("gopher: ellipses", "ellipses per word", share(ellipses, count), 0.2, high=c.max_symbol_word_ratio),
            Bound("gopher: bullets", "lines that begin with a bullet", bullets, 1, high=c.max_bullet_lines_ratio),
            Bound(
                "gopher: lines end in ellipses",
                "lines that end with an ellipsis",
                trailing,
                1,
                high=c.max_ellipsis_lines_ratio,
            ),
            Bound(
                "gopher: words without letters",
                "words with a letter",
                share(batch.sums(words.alpha[ids]), count),
                1,
                low=c.min_alpha_words_ratio,
            ),
            Bound("gopher: few stop words", "kinds of stop words", stops, 8, low=c.min_stop_words),
        ],
    )


def _marks(text: str) -> tuple[int, int, float, float]:
    """Hash signs, ellipses, and the shares of lines that begin with a bullet and that end with an ellipsis."""
    ellipses = text.count("...") + text.count("…")
    bullets = trailing = 0.0
    if ellipses or "-" in text or "•" in text:
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
        trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) if ellipses else 0.0
    return text.count("#"), ellipses, bullets, trailing


def gopher_repetition(config: GopherRepetition, batch: Batch, words: Words) -> Judgement:
    """Apply the repetition rules to a batch.

    Shares of n-grams that are surely below their bound are given as upper estimates.
    """
    c = config
    total = np.array([len(text) for text in batch.texts], dtype=float)
    bounds = _line_bounds(batch, c)
    for n, limit in ((2, c.top_2_grams), (3, c.top_3_grams), (4, c.top_4_grams)):
        value = share(top_characters(batch, words, n), total)
        bounds.append(
            Bound(f"gopher: one {n}-gram repeated", f"characters in the top {n}-gram", value, 0.4, high=limit)
        )
    # what lies in repeated n-grams bounds their count from above, and what lies in longer ones; texts that are dropped
    # anyway are not counted
    limits = (
        c.dup_5_grams,
        c.dup_6_grams,
        c.dup_7_grams,
        c.dup_8_grams,
        c.dup_9_grams,
        c.dup_10_grams,
    )
    fine = ~np.any([bound.fails() for bound in bounds], axis=0)
    value = np.ones(len(batch.texts))
    for n, limit in zip(range(5, 11), limits, strict=True):
        suspects = np.flatnonzero(fine & (value > limit)) if n > 5 else np.arange(len(batch.texts))
        some = batch.select(suspects) if n > 5 else batch
        runs = equal_runs(some, n)
        value[suspects] = share(_covered(some, words, n, runs), total[suspects])
        above = fine[suspects] & (value[suspects] > limit)
        counted = value.copy()
        counted[suspects[above]] = share(
            repeated_characters(some, words, n, runs, above)[above], total[suspects[above]]
        )
        bounds.append(
            Bound(f"gopher: repeated {n}-grams", f"characters in repeated {n}-grams", counted, 0.4, high=limit)
        )
        fine &= ~bounds[-1].fails()
    judged = judge(len(batch.texts), bounds)
    judged.reasons = [
        "gopher: empty" if not text else reason for text, reason in zip(batch.texts, judged.reasons, strict=True)
    ]
    return judged


def _line_bounds(batch: Batch, c: GopherRepetition) -> list[Bound]:
    """Bounds on repeated paragraphs and lines."""
    parts = [_repeated_parts(text) for text in batch.texts]
    paragraphs, paragraph_characters, lines, line_characters = (np.array(column) for column in zip(*parts, strict=True))
    bounds = [
        Bound("gopher: repeated paragraphs", "repeated paragraphs", paragraphs, 1, high=c.dup_para_frac),
        Bound(
            "gopher: characters in repeated paragraphs",
            "characters in repeated paragraphs",
            paragraph_characters,
            1,
            high=c.dup_para_char_frac,
        ),
        Bound("gopher: repeated lines", "repeated lines", lines, 1, high=c.dup_line_frac),
        Bound(
            "gopher: characters in repeated lines",
            "characters in repeated lines",
            line_characters,
            1,
            high=c.dup_line_char_frac,
        ),
    ]
    return bounds


def _repeated_parts(text: str) -> tuple[float, float, float, float]:
    """Shares of paragraphs, their characters, lines and their characters that occurred before in the text."""
    size = len(text) or 1
    stripped = text.strip()
    paragraphs = PARAGRAPHS.split(stripped) if "\n\n" in stripped else [stripped]
    repeated, characters = repeats(paragraphs)
    lines = [
        line for line in text.split("\n") if line
    ]  # as split at \n+, which leaves an empty line at each end that is one
    lines = [""] * text.startswith("\n") + lines + [""] * text.endswith("\n") if lines else ["", ""]
    repeated_lines, line_characters = repeats(lines) if len(lines) > 1 else (0, 0)
    return repeated / len(paragraphs), characters / size, repeated_lines / len(lines), line_characters / size


def repeats(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts occurred before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count, characters


def top_characters(batch: Batch, words: Words, n: int) -> Array:
    """Characters of each text in all occurrences of its most frequent n-gram; of equally frequent ones the first
    counts.
    """
    result = np.zeros(len(batch.texts))
    places, begins = equal_runs(batch, n)
    counts = np.diff(np.append(begins, len(places)))
    often = np.flatnonzero(counts > 1)
    sums = np.concatenate(([0], np.cumsum(words.length[batch.ids], dtype=np.int64)))
    some = np.flatnonzero(batch.counts >= n)
    best, first = np.ones(len(batch.texts), np.int64), batch.starts[:-1].copy()  # all occur once: the first of the text
    if len(often):
        owner, place = batch.owner[places[begins[often]]], places[begins[often]]
        np.maximum.at(best, owner, counts[often])
        top = counts[often] == best[owner]
        first[owner[top]] = len(batch.ids)
        np.minimum.at(first, owner[top], place[top])
    result[some] = (sums[first[some] + n] - sums[first[some]] + n - 1) * best[some]
    return result


def repeated_characters(batch: Batch, words: Words, n: int, runs: Runs, chosen: Array) -> Array:
    """Characters of each chosen text in n-grams that occurred before, read from the left; a repeated one is stepped
    over whole.

    Only n-grams that occur more than once in their text need to be looked at; all others change nothing.
    """
    result = np.zeros(len(batch.texts))
    places, begins = runs
    counts = np.diff(np.append(begins, len(places)))
    often = np.repeat(counts > 1, counts) & chosen[batch.owner[places]]
    at, run = places[often], np.repeat(np.arange(len(begins)), counts)[often]
    order = np.argsort(at)
    at, run = at[order], run[order]
    sums = np.concatenate(([0], np.cumsum(words.length[batch.ids], dtype=np.int64)))
    sizes = sums[at + n] - sums[at] if len(at) else at
    seen: set[int] = set()
    free = 0  # a repeated n-gram takes its words away from those that follow
    for place, key, size, owner in zip(
        at.tolist(), run.tolist(), sizes.tolist(), batch.owner[at].tolist(), strict=True
    ):
        if place < free:
            continue
        if key in seen:
            result[owner] += size
            free = place + n
        else:
            seen.add(key)
    return result


def _covered(batch: Batch, words: Words, n: int, runs: Runs) -> Array:
    """Characters of each text that lie in an n-gram which occurred before: no count of repeated n-grams or longer ones
    is above it.
    """
    places, begins = runs
    before = np.ones(len(places), dtype=bool)
    before[begins] = False
    again = places[before]
    hit = np.bincount(again, minlength=len(batch.ids) + 1) - np.bincount(again + n, minlength=len(batch.ids) + 1)
    return batch.sums(np.where(np.cumsum(hit[:-1]) > 0, words.length[batch.ids], 0)).astype(float)


def equal_runs(batch: Batch, n: int) -> Runs:
    """(places of n-grams inside texts, ordered so that equal ones of one text are neighbours; where each group of
    equals begins).

    Most n-grams that occur once are left out: a table of counts by some bits of the hash leaves few of them to sort.

    The place is kept in the low bits of the hash, so that one sort orders both; groups are in the order of their
    places.
    """
    size = len(batch.ids) - n + 1
    if size <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    owner = batch.owner
    inside = np.flatnonzero(owner[:size] == owner[n - 1 :])
    bits = np.uint64(len(batch.ids).bit_length())
    with np.errstate(over="ignore"):
        key = owner[:size].astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        ids = batch.ids.astype(np.uint64) + np.uint64(1)
        for i in range(n):
            key += ids[i : i + size]
            key *= np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
    key = ((key[inside] >> bits) << bits) | inside.astype(np.uint64)
    table = len(key).bit_length() + 1
    slot = (key >> np.uint64(64 - table)).astype(np.int64)
    key = key[np.bincount(slot, minlength=1 << table)[slot] > 1]
    key.sort()
    places = (key & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    key >>= bits
    own = owner[places]
    changes = (key[1:] != key[:-1]) | (own[1:] != own[:-1])
    return places, np.flatnonzero(np.concatenate(([True], changes))) if len(places) else places
