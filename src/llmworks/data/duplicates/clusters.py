"""Clusters of duplicates: union-find over verified pairs, and the choice of the row to keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from llmworks.data.text.hashing import Array


class Clusters:
    """Disjoint sets (union-find) of duplicate rows; the smallest row is the representative of its set."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows)

    def find(self, row: int) -> int:
        """Return the representative of the cluster of `row`."""
        parent = self._parent
        root = row
        while parent[root] != root:
            root = int(parent[root])
        while parent[row] != root:
            parent[row], row = root, int(parent[row])
        return root

    def join(self, a: int, b: int) -> None:
        """Merge two clusters (union)."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def members(self) -> Iterator[list[int]]:
        """Yield clusters of more than one row, sorted by their first row, rows ascending."""
        joined = np.flatnonzero(self._parent != np.arange(len(self._parent)))
        groups: dict[int, list[int]] = {}
        for row in joined.tolist():
            root = self.find(row)
            groups.setdefault(root, [root]).append(row)
        for root in sorted(groups):
            yield sorted(groups[root])

    def count_sizes(self) -> Counter[int]:
        """Count the clusters of each size above one."""
        return Counter(len(group) for group in self.members())


def choose_best(group: list[int], scores: Array) -> int:
    """Return the row of a cluster to keep: the highest score, ties go to the first."""
    return max(group, key=lambda row: (scores[row], -row))


def group_equal_values(values: Array) -> Iterator[Array]:
    """Yield ascending positions of every value that occurs more than once. Zeros are ignored."""
    order = np.argsort(values)
    ordered = values[order]
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    for i in np.flatnonzero(np.diff(edges) > 1):
        if ordered[edges[i]] != 0:
            yield np.sort(order[edges[i] : edges[i + 1]])
