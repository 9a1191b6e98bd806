"""Evaluate word vectors: word similarity (Spearman correlation with human ratings) and analogies (king - man + woman).

WordSim353 (Finkelstein et al. 2002), SimLex999 (Hill et al. 2015), analogies (Mikolov et al. 2013, 3CosAdd).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmworks.core.errors import DataError

BATCH = 512
MIN_INTERVAL_PAIRS = 10  # no confidence interval below this number of pairs
VectorLookup = Callable[[str], Any]  # a word's vector, or None


@dataclass(frozen=True)
class WordPairs:
    """A word similarity test: word pairs with human similarity ratings."""

    rows: list[tuple[str, str, float]]


@dataclass(frozen=True)
class Analogies:
    """A word analogy test: questions "a is to b as c is to d" by section."""

    sections: dict[str, list[tuple[str, str, str, str]]] = field(default_factory=dict)


def read_word_test(path: Path, *, lowercase: bool = True) -> WordPairs | Analogies:
    """Read a test file: lines of two words and a rating, or of four words below `: section`.

    Lines that begin with # are skipped. DataError for other lines.
    """
    files = [path] if path.is_file() else sorted(p for p in path.glob("[!.]*.t*") if p.is_file())
    if len(files) != 1:
        raise DataError(f"{path}: holds {len(files)} text files, expected one word similarity or analogy test")
    try:
        lines = files[0].read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{files[0]}: not UTF-8 (byte {error.start})") from None
    pairs: list[tuple[str, str, float]] = []
    analogies = Analogies()
    section = "all"
    for number, line in enumerate(lines, 1):
        words = (line.lower() if lowercase else line).split("\t" if "\t" in line else None)
        if not words or line.startswith("#"):
            continue
        if line.startswith(":"):
            section = line[1:].strip()
        elif len(words) == 4 and not pairs:
            analogies.sections.setdefault(section, []).append((words[0], words[1], words[2], words[3]))
        elif len(words) == 3 and not analogies.sections and _is_number(words[2]):
            pairs.append((words[0], words[1], float(words[2])))
        else:
            raise DataError(
                f"{files[0]}: line {number} is neither two words and a number nor four words ({line[:40]!r})"
            )
    if not pairs and not analogies.sections:
        raise DataError(f"{files[0]}: holds no word similarity or analogy test")
    return WordPairs(pairs) if pairs else analogies


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class WordScore:
    """A score with its 95% confidence interval, and how many of the questions were answered."""

    score: float
    low: float
    high: float
    answered: int
    questions: int


def score_similarity(test: WordPairs, vector: VectorLookup) -> WordScore:
    """Compute Spearman's rank correlation of human ratings and cosine similarities, over pairs with both vectors.

    From 10 pairs on, the confidence interval is by Fisher's z (Bonett & Wright 2000).
    """
    from scipy.stats import spearmanr

    known = [(vector(a), vector(b), score) for a, b, score in test.rows]
    known = [(a, b, score) for a, b, score in known if a is not None and b is not None]
    if len(known) < 4 or len({score for *_, score in known}) == 1:  # no rank correlation
        return WordScore(math.nan, math.nan, math.nan, len(known), len(test.rows))
    cosines = [float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or 1)) for a, b, _ in known]
    r = float(spearmanr([score for *_, score in known], cosines).statistic)
    z, wide = math.atanh(max(-0.999999, min(0.999999, r))), 1.96 * math.sqrt((1 + r * r / 2) / (len(known) - 3))
    low, high = (math.tanh(z - wide), math.tanh(z + wide)) if len(known) >= MIN_INTERVAL_PAIRS else (math.nan, math.nan)
    return WordScore(r, low, high, len(known), len(test.rows))


def score_analogies(test: Analogies, words: dict[str, int], table: Any) -> dict[str, WordScore]:
    """Compute analogy accuracy (3CosAdd) by section, and overall under "all".

    The prediction is the word with the vector nearest to b - a + c, excluding a, b and c. Questions with words that
    have no row in `table` are not answered. table: [words, dimensions], normalized to unit length first.
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    found: dict[str, WordScore] = {}
    right_of_all = answered = questions = 0
    for section, rows in test.sections.items():
        known = np.array(
            [[words[w] for w in row] for row in rows if all(w in words for w in row)], dtype=np.int64
        ).reshape(-1, 4)
        right = 0
        for start in range(0, len(known), BATCH):
            a, b, c, d = known[start : start + BATCH].T
            fits = (unit[b] - unit[a] + unit[c]) @ unit.T
            at = np.arange(len(a))
            for given in (a, b, c):
                fits[at, given] = -np.inf
            right += int((fits.argmax(1) == d).sum())
        found[section] = _accuracy(right, len(known), len(rows))
        right_of_all, answered, questions = right_of_all + right, answered + len(known), questions + len(rows)
    return {
        "all": _accuracy(right_of_all, answered, questions),
        **{name: f for name, f in found.items() if name != "all"},
    }


def _accuracy(right: int, answered: int, questions: int) -> WordScore:
    """Return an accuracy with its Wilson confidence interval."""
    if not answered:
        return WordScore(math.nan, math.nan, math.nan, 0, questions)
    p, z = right / answered, 1.96
    middle, wide = p + z * z / (2 * answered), z * math.sqrt(p * (1 - p) / answered + z * z / (4 * answered**2))
    return WordScore(
        p, (middle - wide) / (1 + z * z / answered), (middle + wide) / (1 + z * z / answered), answered, questions
    )
