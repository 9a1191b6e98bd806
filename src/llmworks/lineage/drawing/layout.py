"""Layered layout of a lineage graph: box positions and edge paths. Depends only on `family.Family`; draws nothing.

Layers from top to bottom by distance from the roots (Sugiyama et al. 1981). A layer with many boxes is wrapped into
rows, so that the drawing has about screen proportions; edges to lower rows run between the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmworks.lineage.family import Family

BOX_W, BOX_H, GAP_X, GAP_Y, GAP_ROW, PAD = 176, 52, 26, 46, 12, 14
ASPECT_RATIO = 1.7  # target aspect ratio (width / height)
MAX_SINGLE_ROW = 8  # up to this many boxes stay in one row

EdgePath = tuple[tuple[str, tuple[float, ...]], ...]  # SVG path commands M, L and C with their coordinates


@dataclass(frozen=True)
class GraphEdge:
    """An edge from a parent to a child, with its role and path."""

    parent: str
    child: str
    role: str
    path: EdgePath


@dataclass(frozen=True)
class GraphLayout:
    """Computed layout: upper-left corner of each box by digest, the edges and the total size."""

    boxes: dict[str, tuple[float, float]]
    edges: list[GraphEdge]
    width: float
    height: float


def compute_layout(family: Family) -> GraphLayout:
    """Lay out the graph: each node below its parents as far as there is room; in a column, nodes with children come
    last.
    """
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(family.nodes)
    links = [
        (parent, node.digest, role)
        for node in family.nodes.values()
        for role, parent in node.parents
        if parent in family.nodes
    ]
    graph.add_edges_from((parent, child) for parent, child, _ in links)
    layers = [list(layer) for layer in networkx.topological_generations(graph)]
    row_limit = choose_row_limit([len(layer) for layer in layers])
    width = (
        max((_count_columns(len(layer), row_limit) for layer in layers), default=1) * (BOX_W + GAP_X) + 2 * PAD
    )  # with a gap left of the first column, for edges
    boxes: dict[str, tuple[float, float]] = {}
    tops: dict[str, float] = {}
    y = float(PAD)
    for depth, layer in enumerate(layers):
        preferred = _compute_preferred(graph, layer, boxes, list(family.nodes))
        layer.sort(key=lambda d: (preferred[d], family.nodes[d].label))
        rows = -(-len(layer) // row_limit)
        columns = [layer[at : at + rows] for at in range(0, len(layer), rows)]
        for column, x in zip(
            columns,
            _spread_columns([[preferred[d] for d in column] for column in columns], width, top=not depth),
            strict=True,
        ):
            for row, digest in enumerate(sorted(column, key=lambda d: graph.out_degree(d) > 0)):
                boxes[digest], tops[digest] = (x, y + row * (BOX_H + GAP_ROW)), y
        y += rows * (BOX_H + GAP_ROW) - GAP_ROW + GAP_Y
    return GraphLayout(
        boxes,
        [
            GraphEdge(parent, child, role, _route_edge(boxes[parent], boxes[child], tops[child]))
            for parent, child, role in links
        ],
        width,
        y - GAP_Y + PAD,
    )


def choose_row_limit(sizes: list[int]) -> int:
    """Return the maximum boxes per row, given layer sizes, that brings the drawing closest to SHAPE."""

    def aspect_error(row_limit: int) -> float:
        width = max(_count_columns(size, row_limit) for size in sizes) * (BOX_W + GAP_X)
        height = sum(-(-size // row_limit) * (BOX_H + GAP_ROW) + GAP_Y for size in sizes)
        return abs(math.log(width / height / ASPECT_RATIO))

    return min(range(MAX_SINGLE_ROW, max([MAX_SINGLE_ROW, *sizes]) + 1), key=aspect_error) if sizes else MAX_SINGLE_ROW


def _count_columns(count: int, row_limit: int) -> int:
    rows = -(-count // row_limit)
    return -(-count // rows) if rows else 1


def _compute_preferred(
    graph: Any, layer: list[str], boxes: dict[str, tuple[float, float]], order: list[str]
) -> dict[str, float]:
    """Compute each node's preferred position: below its parents; roots in the order of their children."""
    if all(graph.in_degree(d) for d in layer):
        return {d: sum(boxes[p][0] for p in graph.predecessors(d)) / graph.in_degree(d) for d in layer}
    places = {d: at for at, d in enumerate(order)}
    return {d: sum(places[c] for c in graph.successors(d)) / max(graph.out_degree(d), 1) for d in layer}


def _spread_columns(preferred: list[list[float]], width: float, *, top: bool) -> list[float]:
    """Compute the x positions of columns from left to right: each at the mean preferred position of its nodes, without
    overlap; the top layer is spaced evenly.
    """
    low, high, step = float(PAD + GAP_X), width - PAD - BOX_W, BOX_W + GAP_X
    if top:
        xs = (
            [(low + high) / 2]
            if len(preferred) == 1
            else [low + at * (high - low) / (len(preferred) - 1) for at in range(len(preferred))]
        )
    else:
        xs = [min(max(low, sum(column) / len(column)), high) for column in preferred]
    for at in range(1, len(xs)):  # shift overlapping columns right
        xs[at] = max(xs[at], xs[at - 1] + step)
    for at in range(len(xs) - 1, -1, -1):  # then back left where they exceed the width
        xs[at] = min(xs[at], high - (len(xs) - 1 - at) * step)
    return xs


def _route_edge(parent: tuple[float, float], child: tuple[float, float], top: float) -> EdgePath:
    """Route an edge from the bottom of a parent to the top of a child; to a lower row, down beside its column and into
    the box's left side.
    """
    a, b, x, y = parent[0] + BOX_W / 2, parent[1] + BOX_H, *child
    if y == top:
        c = x + BOX_W / 2
        return (("M", (a, b)), ("C", (a, b + 24, c, y - 24, c, y)))
    gutter, middle = x - GAP_X / 2, y + BOX_H / 2
    return (
        ("M", (a, b)),
        ("C", (a, b + 24, gutter, top - 24, gutter, top)),
        ("L", (gutter, middle - 9)),
        ("C", (gutter, middle, gutter, middle, x, middle)),
    )
