"""Diversity filter: reject texts that are too similar to earlier ones, by ROUGE-L as in Self-Instruct (Wang et al.
2023).
"""

from __future__ import annotations

import math
from collections import defaultdict

from llmworks.core.text.words import split_words
from llmworks.score.rouge import rouge_l


class DiversityPool:
    """A set of texts whose pairwise ROUGE-L is below `threshold`.

    Prefix filtering (Chaudhuri et al. 2006) finds candidates: similar texts share one of the longest words of each, so
    few pairs are compared.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._texts_words: list[list[str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._texts_words)

    def add(self, text: str) -> bool:
        """Add a text; return False when it is too similar to another one, or has no words."""
        own = split_words(text)
        prefix = self._prefix(own)
        near = {i for word in prefix for i in self._by_word[word]}
        if not own or any(rouge_l(self._texts_words[i], own) >= self.threshold for i in near):
            return False
        for word in prefix:
            self._by_word[word].append(len(self._texts_words))
        self._texts_words.append(own)
        return True

    def _prefix(self, own: list[str]) -> set[str]:
        """Return a set of words of which any similar text shares at least one.

        The shortest words that are not needed for this are left out.
        """
        # F >= t needs LCS >= t / (2 - t) times the longer... of either text, since the other has at least LCS words
        needed = math.ceil(self.threshold / (2 - self.threshold) * len(own) - 1e-9)
        distinct = sorted(set(own), key=lambda word: (-len(word), word))
        count = {word: own.count(word) for word in distinct}
        kept: set[str] = set()
        left = len(own)
        for word in distinct:
            if left < needed:
                break
            kept.add(word)
            left -= count[word]
        return kept
