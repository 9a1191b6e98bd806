"""Hashed word unigram and bigram features of texts, and a logistic regression classifier over them.

Fast and deterministic across machines.

Feature hashing (hashing trick): Weinberger et al. 2009. Values are square roots of counts; rows have unit L2 norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmworks.data.text.hashing import Array, TextHashes, hash_shingles, hash_words

BITS = 20  # features: 2**BITS
CHARACTERS = 20_000  # of each text that are used


def hash_features(column: Any) -> Any:
    """Return the CSR feature matrix [texts, 2**BITS] of a string column."""
    import pyarrow.compute as pc
    from scipy.sparse import vstack

    return vstack(
        [_feature_rows(words) for words in hash_words(pc.utf8_slice_codeunits(column, 0, CHARACTERS))], format="csr"
    )


def _feature_rows(words: TextHashes) -> Any:
    from scipy.sparse import csr_matrix

    pairs = hash_shingles(words, 2)
    mask = np.uint64((1 << BITS) - 1)
    owner = np.concatenate((words.owner, pairs.owner)).astype(np.uint64)
    keys = (owner << np.uint64(BITS)) | (np.concatenate((words.values, pairs.values)) & mask)
    keys, counts = np.unique(keys, return_counts=True)
    rows = (keys >> np.uint64(BITS)).astype(np.int64)
    values = np.sqrt(counts).astype(np.float32)
    length = np.sqrt(np.bincount(rows, weights=values.astype(np.float64) ** 2, minlength=len(words)))
    values /= length[rows].astype(np.float32)
    starts = np.searchsorted(rows, np.arange(len(words) + 1))
    return csr_matrix((values, (keys & mask).astype(np.int32), starts), shape=(len(words), 1 << BITS))


@dataclass(frozen=True)
class LinearClassifier:
    """Logistic regression classifier: probability that a text belongs to the positive class."""

    weights: Array
    bias: float

    def predict_proba(self, column: Any) -> Array:
        """Return the positive-class probability of every text, between 0 and 1."""
        return predict_probabilities(self, hash_features(column))

    def save(self, path: Path) -> None:
        """Save the weights to an npz file."""
        np.savez(path, weights=self.weights, bias=self.bias)

    @staticmethod
    def load(path: Path) -> LinearClassifier:
        """Load the weights from an npz file."""
        with np.load(path) as saved:
            return LinearClassifier(saved["weights"], float(saved["bias"]))


def predict_probabilities(model: LinearClassifier, matrix: Any) -> Array:
    """Compute positive-class probabilities of a feature matrix (sigmoid of the logits)."""
    probabilities: Array = 1 / (1 + np.exp(-(matrix @ model.weights + model.bias)))
    return probabilities


def fit_classifier(matrix: Any, labels: Array, c: float, seed: int) -> LinearClassifier:
    """Fit a logistic regression with an L2 penalty (scikit-learn) and balanced class weights."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, class_weight="balanced", max_iter=300, random_state=seed)
    model.fit(matrix, labels)
    return LinearClassifier(model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def top_terms(
    model: LinearClassifier, texts: list[str], count: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Return (terms with the largest positive weights, with the largest negative ones) among unigrams and bigrams."""
    import re

    import pyarrow as pa

    counts: dict[str, int] = {}
    for text in texts:
        words = re.findall(r"[0-9a-z\x80-\U0010ffff]+", text[:CHARACTERS].lower())
        for term in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
            counts[term] = counts.get(term, 0) + 1
    terms = [term for term, n in counts.items() if n >= 5]
    column = pa.array(terms)
    weights: list[float] = []
    mask = np.uint64((1 << BITS) - 1)
    for block in hash_words(column):
        pairs = hash_shingles(block, 2)
        for i in range(len(block)):
            numbers = block[i] if len(block[i]) == 1 else pairs[i]
            weights.append(float(model.weights[int(numbers[0] & mask)]) if len(numbers) else 0.0)
    ranked = sorted(zip(terms, weights, strict=True), key=lambda item: (-item[1], item[0]))
    return ranked[:count], ranked[::-1][:count]
