"""Draw a family: as a tree of lines for the terminal, as a layered SVG for pages. Knows only `family.Family`."""

from __future__ import annotations

import html

from llmworks.lineage.family import Family, Node

COLORS = {"model": "#2563eb", "adapter": "#7c3aed", "dataset": "#059669", "tokenizer": "#0891b2", "index": "#b45309", "report": "#64748b"}
BOX_W, BOX_H, GAP_X, GAP_Y, PAD = 176, 52, 22, 46, 14


def draw_text(family: Family) -> str:
    """Roots on the left, children indented below; a node with several parents stands below the one it is made of, the rest are named."""
    lines: list[str] = []
    primary = {node.digest: _primary_parent(node) for node in family.nodes.values()}

    def visit(node: Node, prefix: str, last: bool, top: bool) -> None:
        others = [family.nodes[p].label for _, p in node.parents if p != primary[node.digest] and p in family.nodes]
        joint = "" if top else ("└─ " if last else "├─ ")
        made = f"  [{node.stage}]" if node.stage else f"  [from outside{f': {node.ref}' if node.ref else ''}]"
        extra = f"  + {', '.join(dict.fromkeys(others))}" if others else ""
        lines.append(f"{prefix}{joint}{node.label}  {node.kind} {node.digest[:12]}{made}{extra}{_facts(node)}")
        below = [child for child in family.nodes.values() if primary[child.digest] == node.digest]
        for i, child in enumerate(below):
            visit(child, prefix + ("" if top else ("   " if last else "│  ")), i == len(below) - 1, False)

    for node in family.nodes.values():
        if primary[node.digest] not in family.nodes:
            visit(node, "", True, True)
    return "\n".join(lines)


def _primary_parent(node: Node) -> str:
    """The parent that a node is made of: a model before an adapter before data; for a comparison, the last."""
    for role in ("model", "adapter", "data"):
        for name, digest in node.parents:
            if name == role:
                return digest
    return node.parents[-1][1] if node.parents else ""


def _facts(node: Node) -> str:
    if node.artifact is None or node.artifact.manifest is None:
        return ""
    numbers = [(k, v) for k, v in node.artifact.metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    shown = [f"{k} {v:.4g}" for k, v in numbers if k in ("score", "difference", "rows", "loss")]
    return f"  ({', '.join(shown)})" if shown else ""


def draw_svg(family: Family) -> str:
    """Layers from top to bottom by distance from the roots; colour by kind; exact derivations as solid, declared as dashed edges."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(family.nodes)
    graph.add_edges_from((p, n.digest) for n in family.nodes.values() for _, p in n.parents if p in family.nodes)
    layers = [list(layer) for layer in networkx.topological_generations(graph)]
    place: dict[str, tuple[float, float]] = {}
    width = max((len(layer) for layer in layers), default=1) * (BOX_W + GAP_X) - GAP_X + 2 * PAD
    for depth, layer in enumerate(layers):
        layer.sort(key=lambda d: (sum(place[p][0] for p in graph.predecessors(d)) / max(graph.in_degree(d), 1), family.nodes[d].label))
        left = (width - (len(layer) * (BOX_W + GAP_X) - GAP_X)) / 2
        for i, digest in enumerate(layer):
            place[digest] = (left + i * (BOX_W + GAP_X), PAD + depth * (BOX_H + GAP_Y))
    height = len(layers) * (BOX_H + GAP_Y) - GAP_Y + 2 * PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui,sans-serif" font-size="12">'
    ]
    for parent, child in graph.edges:
        (x1, y1), (x2, y2) = place[parent], place[child]
        a, b, c, d = x1 + BOX_W / 2, y1 + BOX_H, x2 + BOX_W / 2, y2
        dash = ' stroke-dasharray="4 3"' if family.nodes[child].derivation == "declared" else ""
        parts.append(
            f'<path d="M{a:.0f} {b:.0f} C{a:.0f} {b + 24:.0f} {c:.0f} {d - 24:.0f} {c:.0f} {d:.0f}" fill="none" stroke="#94a3b8" stroke-width="1.4"{dash}/>'
        )
    for digest, (x, y) in place.items():
        node = family.nodes[digest]
        color = COLORS.get(node.kind, "#64748b")
        lines = (_short(node.label, 25), _short(node.stage or node.ref or "from outside", 28), f"{node.kind} {digest[:8]}")
        parts.append(
            f'<g><title>{html.escape(f"{node.label}: {node.kind} {digest}")}</title><rect x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="7" fill="#fff" stroke="{color}" stroke-width="1.6"/>'
        )
        for i, line in enumerate(lines):
            weight = ' font-weight="600"' if i == 0 else ""
            parts.append(
                f'<text x="{x + 10:.0f}" y="{y + 17 + 14.5 * i:.0f}" fill="{color if i != 1 else "#475569"}"{weight} font-size="{12 if i == 0 else 10.5}">{html.escape(line)}</text>'
            )
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
