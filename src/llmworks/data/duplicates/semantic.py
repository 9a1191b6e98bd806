"""Semantic deduplication (SemDeDup, Abbas et al. 2023): cosine similarity of embeddings within k-means clusters.

Up to EXACT documents, every pair is compared. Above that, each document is compared within the two clusters with the
nearest centroids.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmworks.core.errors import MissingDependency
from llmworks.data.duplicates.clusters import Clusters
from llmworks.data.text.hashing import Array

EXACT = 20_000
CELL = 2_000  # approximate documents per k-means cluster
BLOCK = 2_000  # rows of one matrix product


def cluster_similar(
    vectors: Array, threshold: float, clusters: Clusters, seed: int = 0, max_exact: int = EXACT, cell_size: int = CELL
) -> tuple[int, int]:
    """Cluster rows whose cosine similarity is at least `threshold`; returns (pairs compared, pairs joined).

    `vectors` [rows, dimensions] have unit length.
    """
    compared = joined = 0
    for members in iter_cells(vectors, seed, max_exact, cell_size):
        for at in range(0, len(members), BLOCK):
            some = members[at : at + BLOCK]
            products = vectors[some].astype(np.float32) @ vectors[members[at:]].astype(np.float32).T
            compared += len(some) * (len(members) - at) - len(some) * (len(some) + 1) // 2
            for i, j in zip(*np.nonzero(np.triu(products >= threshold, 1)), strict=True):
                a, b = int(some[i]), int(members[at + j])
                if clusters.find(a) != clusters.find(b):
                    clusters.join(a, b)
                    joined += 1
    return compared, joined


def iter_cells(vectors: Array, seed: int, max_exact: int, cell_size: int) -> Iterator[Array]:
    """Yield groups of rows to compare with one another; zero vectors are in no group."""
    rows = np.flatnonzero(np.any(vectors, axis=1))
    if len(rows) <= max_exact:
        yield rows
        return
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise MissingDependency(
            "data.semdedup needs scikit-learn for this many documents; install it with: pip install 'llmworks[corpus]'"
        ) from None
    count = max(2, len(rows) // cell_size)
    means = MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=1, max_iter=20).fit(
        vectors[rows].astype(np.float32)
    )
    nearest: list[Array] = []
    for at in range(0, len(rows), BLOCK * 10):
        near = vectors[rows[at : at + BLOCK * 10]].astype(np.float32) @ means.cluster_centers_.T.astype(np.float32)
        near -= 0.5 * np.square(means.cluster_centers_).sum(axis=1).astype(
            np.float32
        )  # nearest centroid by Euclidean distance
        nearest.append(np.argpartition(-near, 1, axis=1)[:, :2])
    both = np.concatenate(nearest)
    for number in range(count):
        members = rows[(both == number).any(axis=1)]
        if len(members) > 1:
            yield members
