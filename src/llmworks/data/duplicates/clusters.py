"""Which documents belong together: union-find over verified pairs, and which of each cluster stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from llmworks.data.text.hashing import Array


class Clusters:
    """Rows that were found to be duplicates of one another (disjoint sets, the smallest row stands for its set)."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows)

    def find(self, row: int) -> int:
        """The row that stands for the cluster of `row`."""
        parent = self._parent
        root = row
        while parent[root] != root:
            root = int(parent[root])
        while parent[row] != root:
            parent[row], row = root, int(parent[row])
        return root

    def join(self, a: int, b: int) -> None:
        """Make two clusters one."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def members(self) -> Iterator[list[int]]:
        """Clusters of more than one row, each in order, by their first row."""
        joined = np.flatnonzero(self._parent != np.arange(len(self._parent)))
        groups: dict[int, list[int]] = {}
        for row in joined.tolist():
            root = self.find(row)
            groups.setdefault(root, [root]).append(row)
        for root in sorted(groups):
            yield sorted(groups[root])

    def sizes(self) -> Counter[int]:
        """How many clusters there are of each size above one."""
        return Counter(len(group) for group in self.members())


def best(group: list[int], scores: Array) -> int:
    """The row of a cluster that stays: the highest score, the first of equals."""
    return max(group, key=lambda row: (scores[row], -row))


def groups_of_equals(values: Array) -> Iterator[Array]:
    """Places of equal values, in ascending order, for every value that occurs more than once. Zeros are no values."""
    order = np.argsort(values)
    ordered = values[order]
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    for i in np.flatnonzero(np.diff(edges) > 1):
        if ordered[edges[i]] != 0:
            yield np.sort(order[edges[i] : edges[i + 1]])
