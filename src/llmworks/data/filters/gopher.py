"""Gopher quality and repetition filters (Rae et al. 2021, arXiv:2112.11446, appendix A1.1 and table A1).

Decisions match datatrove's GopherQualityFilter and GopherRepetitionFilter. Sorted n-gram hashes first give upper bounds
of repetition for a whole batch; only texts whose bound exceeds a threshold are counted n-gram by n-gram.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.filters.rules import FilterDecisions, ThresholdRule, apply_rules, safe_ratio
from llmworks.data.filters.words import Array, WordBatch, WordVocabulary

Runs = tuple[Array, Array]
PARAGRAPHS = re.compile(r"\n{2,}")


class GopherQuality(Config):
    """Gopher quality filter."""

    min_doc_words: int = Field(50, ge=0, description="minimum number of words (symbol-only words are not counted)")
    max_doc_words: int = Field(100_000, gt=0, description="maximum number of words (symbol-only words are not counted)")
    min_avg_word_length: float = Field(3, ge=0, description="minimum mean length of those words in characters")
    max_avg_word_length: float = Field(10, gt=0, description="maximum mean length of those words in characters")
    max_symbol_word_ratio: float = Field(
        0.1, ge=0, description="maximum ratio of hash signs to words, and of ellipses to words"
    )
    max_bullet_lines_ratio: float = Field(0.9, ge=0, description="maximum fraction of lines that start with a bullet")
    max_ellipsis_lines_ratio: float = Field(
        0.3, ge=0, description="maximum fraction of lines that end with an ellipsis"
    )
    min_alpha_words_ratio: float = Field(0.8, ge=0, description="minimum fraction of words with at least one letter")
    min_stop_words: int = Field(
        2, ge=0, description="minimum number of distinct stop words among: the, be, to, of, and, that, have, with"
    )


class GopherRepetition(Config):
    """Gopher repetition filter: maximum fractions of a document's lines, paragraphs and characters."""

    dup_line_frac: float = Field(0.3, ge=0, description="duplicate lines")
    dup_para_frac: float = Field(0.3, ge=0, description="duplicate paragraphs")
    dup_line_char_frac: float = Field(0.2, ge=0, description="characters in duplicate lines")
    dup_para_char_frac: float = Field(0.2, ge=0, description="characters in duplicate paragraphs")
    top_2_grams: float = Field(0.2, ge=0, description="characters in the most frequent word 2-gram")
    top_3_grams: float = Field(0.18, ge=0, description="characters in the most frequent 3-gram")
    top_4_grams: float = Field(0.16, ge=0, description="characters in the most frequent 4-gram")
    dup_5_grams: float = Field(0.15, ge=0, description="characters in duplicate 5-grams")
    dup_6_grams: float = Field(0.14, ge=0, description="characters in duplicate 6-grams")
    dup_7_grams: float = Field(0.13, ge=0, description="characters in duplicate 7-grams")
    dup_8_grams: float = Field(0.12, ge=0, description="characters in duplicate 8-grams")
    dup_9_grams: float = Field(0.11, ge=0, description="characters in duplicate 9-grams")
    dup_10_grams: float = Field(0.1, ge=0, description="characters in duplicate 10-grams")


def filter_gopher_quality(config: GopherQuality, batch: WordBatch, words: WordVocabulary) -> FilterDecisions:
    """Apply the quality filter to a batch."""
    ids, count = batch.ids, batch.counts
    real = words.symbol[ids] == 0
    real_count = batch.sum_per_text(real)
    # the length of words and English stop words say nothing of scripts without spaces, whose characters are the words
    spaceless = find_spaceless(batch, words)
    spaced = real & (words.spaceless[ids] == 0)
    spaced_count = batch.sum_per_text(spaced)
    length = safe_ratio(batch.sum_per_text(np.where(spaced, words.length[ids], 0)), spaced_count)
    length[(spaced_count == 0) | spaceless] = np.nan  # undefined mean passes
    stops = np.zeros(len(batch.texts))
    flags = words.stop[ids]
    for bit in range(8):
        stops += batch.sum_per_text(flags & (1 << bit)) > 0
    stops[spaceless] = np.nan
    marks = [_count_marks(text) for text in batch.texts]
    hashes, ellipses, bullets, trailing = (np.array(column, dtype=float) for column in zip(*marks, strict=True))
    c = config
    return apply_rules(
        len(batch.texts),
        [
            ThresholdRule("gopher: too few words", "words", real_count, 2000, low=c.min_doc_words),
            ThresholdRule("gopher: too many words", "words", real_count, 2000, high=c.max_doc_words),
            ThresholdRule("gopher: words too short", "mean word length", length, 12, low=c.min_avg_word_length),
            ThresholdRule("gopher: words too long", "mean word length", length, 12, high=c.max_avg_word_length),
            ThresholdRule(
                "gopher: hash signs",
                "hash signs per word",
                safe_ratio(hashes, count),
                0.2,
                high=c.max_symbol_word_ratio,
            ),
            ThresholdRule(
                "gopher: ellipses", "ellipses per word", safe_ratio(ellipses, count), 0.2, high=c.max_symbol_word_ratio
            ),
            ThresholdRule(
                "gopher: bullets", "lines that begin with a bullet", bullets, 1, high=c.max_bullet_lines_ratio
            ),
            ThresholdRule(
                "gopher: lines end in ellipses",
                "lines that end with an ellipsis",
                trailing,
                1,
                high=c.max_ellipsis_lines_ratio,
            ),
            ThresholdRule(
                "gopher: words without letters",
                "words with a letter",
                safe_ratio(batch.sum_per_text(words.alpha[ids]), np.where(spaceless, real_count, count)),
                1,
                low=c.min_alpha_words_ratio,
            ),
            ThresholdRule("gopher: few stop words", "kinds of stop words", stops, 8, low=c.min_stop_words),
        ],
    )


def find_spaceless(batch: WordBatch, words: WordVocabulary) -> Array:
    """Return which texts are mostly written in scripts without spaces, whose words are single characters."""
    found: Array = batch.sum_per_text(words.spaceless[batch.ids]) * 2 > batch.sum_per_text(words.alpha[batch.ids])
    return found


def _count_marks(text: str) -> tuple[int, int, float, float]:
    """Count hash signs, ellipses, and the fractions of lines that start with a bullet and that end with an ellipsis."""
    ellipses = text.count("...") + text.count("…")
    bullets = trailing = 0.0
    if ellipses or "-" in text or "•" in text:
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
        trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) if ellipses else 0.0
    return text.count("#"), ellipses, bullets, trailing


def filter_gopher_repetition(config: GopherRepetition, batch: WordBatch, words: WordVocabulary) -> FilterDecisions:
    """Apply the repetition filter to a batch.

    Values of n-grams certainly below their bound are upper bounds, not exact fractions.
    """
    c = config
    total = np.array([len(text) for text in batch.texts], dtype=float)
    bounds = _line_rules(batch, c)
    for n, limit in ((2, c.top_2_grams), (3, c.top_3_grams), (4, c.top_4_grams)):
        value = safe_ratio(count_top_ngram_characters(batch, words, n), total)
        bounds.append(
            ThresholdRule(f"gopher: one {n}-gram repeated", f"characters in the top {n}-gram", value, 0.4, high=limit)
        )
        # characters covered by repeated n-grams bound the exact count, and that of longer n-grams, from above;
        # documents that are already dropped are not counted
    limits = (
        c.dup_5_grams,
        c.dup_6_grams,
        c.dup_7_grams,
        c.dup_8_grams,
        c.dup_9_grams,
        c.dup_10_grams,
    )
    fine = ~np.any([bound.find_failures() for bound in bounds], axis=0)
    value = np.ones(len(batch.texts))
    spaceless = find_spaceless(batch, words)  # 10 characters are about 5 words
    for n, limit in zip(range(5, 11), limits, strict=True):
        suspects = np.flatnonzero(fine & (value > limit)) if n > 5 else np.arange(len(batch.texts))
        some = batch.select(suspects) if n > 5 else batch
        runs = group_equal_ngrams(some, n)
        value[suspects] = safe_ratio(_count_covered_characters(some, words, n, runs), total[suspects])
        above = fine[suspects] & (value[suspects] > limit)
        counted = value.copy()
        counted[suspects[above]] = safe_ratio(
            count_duplicate_ngram_characters(some, words, n, runs, above)[above], total[suspects[above]]
        )
        if n < 10:
            counted[spaceless] = np.nan
        bounds.append(
            ThresholdRule(f"gopher: repeated {n}-grams", f"characters in repeated {n}-grams", counted, 0.4, high=limit)
        )
        fine &= ~bounds[-1].find_failures()
    decisions = apply_rules(len(batch.texts), bounds)
    decisions.reasons = [
        "gopher: empty" if not text else reason for text, reason in zip(batch.texts, decisions.reasons, strict=True)
    ]
    return decisions


def _line_rules(batch: WordBatch, c: GopherRepetition) -> list[ThresholdRule]:
    """Return the rules for duplicate paragraphs and lines."""
    parts = [_duplicate_fractions(text) for text in batch.texts]
    paragraphs, paragraph_characters, lines, line_characters = (np.array(column) for column in zip(*parts, strict=True))
    bounds = [
        ThresholdRule("gopher: repeated paragraphs", "repeated paragraphs", paragraphs, 1, high=c.dup_para_frac),
        ThresholdRule(
            "gopher: characters in repeated paragraphs",
            "characters in repeated paragraphs",
            paragraph_characters,
            1,
            high=c.dup_para_char_frac,
        ),
        ThresholdRule("gopher: repeated lines", "repeated lines", lines, 1, high=c.dup_line_frac),
        ThresholdRule(
            "gopher: characters in repeated lines",
            "characters in repeated lines",
            line_characters,
            1,
            high=c.dup_line_char_frac,
        ),
    ]
    return bounds


def _duplicate_fractions(text: str) -> tuple[float, float, float, float]:
    """Compute fractions of duplicate paragraphs, their characters, duplicate lines and their characters."""
    size = len(text) or 1
    stripped = text.strip()
    paragraphs = PARAGRAPHS.split(stripped) if "\n\n" in stripped else [stripped]
    repeated, characters = count_duplicates(paragraphs)
    lines = [
        line for line in text.split("\n") if line
    ]  # as re.split(r"\n+"), which yields an empty string at an end with a newline
    lines = [""] * text.startswith("\n") + lines + [""] * text.endswith("\n") if lines else ["", ""]
    repeated_lines, line_characters = count_duplicates(lines) if len(lines) > 1 else (0, 0)
    return repeated / len(paragraphs), characters / size, repeated_lines / len(lines), line_characters / size


def count_duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """Count duplicate parts (after the first occurrence), and their characters."""
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


def count_top_ngram_characters(batch: WordBatch, words: WordVocabulary, n: int) -> Array:
    """Count characters of each text in all occurrences of its most frequent n-gram; ties go to the first."""
    result = np.zeros(len(batch.texts))
    places, begins = group_equal_ngrams(batch, n)
    counts = np.diff(np.append(begins, len(places)))
    often = np.flatnonzero(counts > 1)
    sums = np.concatenate(([0], np.cumsum(words.length[batch.ids], dtype=np.int64)))
    some = np.flatnonzero(batch.counts >= n)
    best, first = (
        np.ones(len(batch.texts), np.int64),
        batch.starts[:-1].copy(),
    )  # default: each occurs once, take the first of the text
    if len(often):
        owner, place = batch.owner[places[begins[often]]], places[begins[often]]
        np.maximum.at(best, owner, counts[often])
        top = counts[often] == best[owner]
        first[owner[top]] = len(batch.ids)
        np.minimum.at(first, owner[top], place[top])
    result[some] = (sums[first[some] + n] - sums[first[some]] + n - 1) * best[some]
    return result


def count_duplicate_ngram_characters(
    batch: WordBatch, words: WordVocabulary, n: int, runs: Runs, chosen: Array
) -> Array:
    """Count characters of each chosen text in duplicate n-grams, left to right; a duplicate skips all its words.

    Only n-grams that occur more than once in their text are visited; others cannot contribute.
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
    free = 0  # a duplicate n-gram consumes its words
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


def _count_covered_characters(batch: WordBatch, words: WordVocabulary, n: int, runs: Runs) -> Array:
    """Count characters of each text covered by duplicate n-grams: an upper bound for duplicate n-grams of this size
    or longer.
    """
    places, begins = runs
    before = np.ones(len(places), dtype=bool)
    before[begins] = False
    again = places[before]
    hit = np.bincount(again, minlength=len(batch.ids) + 1) - np.bincount(again + n, minlength=len(batch.ids) + 1)
    return batch.sum_per_text(np.where(np.cumsum(hit[:-1]) > 0, words.length[batch.ids], 0)).astype(float)


def group_equal_ngrams(batch: WordBatch, n: int) -> Runs:
    """Group equal n-grams; returns (positions, sorted so that equal n-grams of one text are adjacent; group starts).

    Most unique n-grams are skipped: a count table over the top hash bits leaves few of them to sort.

    The position is stored in the low bits of the hash, so one sort orders both; within a group, positions ascend.
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
