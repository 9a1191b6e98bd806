"""Texts that are unlike one another: what is too much like one that is there is refused.

By ROUGE-L, as in Self-Instruct (Wang et al. 2023).
"""

from __future__ import annotations

import math
from collections import defaultdict

from llmworks.score.rouge import rouge_l, words


class Pool:
    """Grows by texts whose ROUGE-L with every one that is there is below `threshold`.

    Two texts that alike share a word among the longest of each (prefix filtering, Chaudhuri et al. 2006), so few have
    to be compared.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._texts: list[list[str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> bool:
        """Add a text; False when one like it is there already, or when it has no words."""
        own = words(text)
        prefix = self._prefix(own)
        near = {i for word in prefix for i in self._by_word[word]}
        if not own or any(rouge_l(self._texts[i], own) >= self.threshold for i in near):
            return False
        for word in prefix:
            self._by_word[word].append(len(self._texts))
        self._texts.append(own)
        return True

    def _prefix(self, own: list[str]) -> set[str]:
        """Words of which at least one is shared by any text that is alike: all but so many of the shortest as are not
        needed for it.
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
