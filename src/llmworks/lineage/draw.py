"""Draw a family: as a tree of lines for the terminal, in layers as SVG, PNG and Mermaid. Knows only `family.Family`; the page that can be searched is `page.py`'s."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

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
        told = next((role for role, digest in node.parents if digest == primary[node.digest] and line_of(node, role) == "dotted"), "")
        by = f"  ({told})" if told else ""
        lines.append(f"{prefix}{joint}{node.label}  {node.kind}{'' if node.digest.startswith('claimed:') else f' {node.digest[:12]}'}{made}{by}{extra}{_facts(node)}")
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


@dataclass(frozen=True)
class Placed:
    """Where nodes stand, by digest, their upper left corner; edges (parent, child, role); the size of it all."""

    boxes: dict[str, tuple[float, float]]
    edges: list[tuple[str, str, str]]
    width: float
    height: float


def placed(family: Family) -> Placed:
    """Layers from top to bottom by distance from the roots; in a layer each node is below its parents, as far as there is room."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(family.nodes)
    edges = [(parent, node.digest, role) for node in family.nodes.values() for role, parent in node.parents if parent in family.nodes]
    graph.add_edges_from((parent, child) for parent, child, _ in edges)
    layers = [list(layer) for layer in networkx.topological_generations(graph)]
    boxes: dict[str, tuple[float, float]] = {}
    width = max((len(layer) for layer in layers), default=1) * (BOX_W + GAP_X) - GAP_X + 2 * PAD
    for depth, layer in enumerate(layers):
        wanted = {d: sum(boxes[p][0] for p in graph.predecessors(d)) / max(graph.in_degree(d), 1) if depth else sum(list(family.nodes).index(c) for c in graph.successors(d)) / max(graph.out_degree(d), 1) for d in layer}
        layer.sort(key=lambda d: (wanted[d], family.nodes[d].label))
        room = width - 2 * PAD - BOX_W
        xs = [PAD + (room / 2 if len(layer) == 1 and not depth else min(max(0.0, wanted[d] - PAD if depth else i * room / max(1, len(layer) - 1)), room)) for i, d in enumerate(layer)]
        for i in range(1, len(xs)):  # no two in one place: those to the right move on
            xs[i] = max(xs[i], xs[i - 1] + BOX_W + GAP_X)
        over = max(0.0, xs[-1] - (width - PAD - BOX_W))
        for i in range(len(xs) - 1, -1, -1):
            xs[i] = min(xs[i], width - PAD - BOX_W - (len(xs) - 1 - i) * (BOX_W + GAP_X)) if over else xs[i]
        for digest, x in zip(layer, xs, strict=True):
            boxes[digest] = (x, PAD + depth * (BOX_H + GAP_Y))
    return Placed(boxes, edges, width, len(layers) * (BOX_H + GAP_Y) - GAP_Y + 2 * PAD)


def line_of(node: Node, role: str) -> str:
    """How an edge to a node is drawn: solid where it can be derived again, dashed where it is declared, dotted where a file claims it or weights say so."""
    return "dotted" if role.startswith("by its weights") or " says: " in role else "dashed" if node.derivation == "declared" else "solid"


DASHES = {"solid": "", "dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.5 3"'}


def told(node: Node) -> tuple[str, str, str]:
    """What stands in a node's box."""
    return node.label, node.stage or node.ref or "from outside", f"{node.kind} {node.digest[:8] if not node.digest.startswith('claimed:') else 'known by its name'}"


def draw_svg(family: Family) -> str:
    """Boxes by kind, `placed`; edges by `line_of`."""
    at = placed(family)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{at.width:.0f}" height="{at.height:.0f}" viewBox="0 0 {at.width:.0f} {at.height:.0f}" font-family="system-ui,sans-serif" font-size="12">']
    for parent, child, role in at.edges:
        (x1, y1), (x2, y2) = at.boxes[parent], at.boxes[child]
        a, b, c, d = x1 + BOX_W / 2, y1 + BOX_H, x2 + BOX_W / 2, y2
        parts.append(f'<path class="edge" data-from="{html.escape(parent)}" data-to="{html.escape(child)}" d="M{a:.0f} {b:.0f} C{a:.0f} {b + 24:.0f} {c:.0f} {d - 24:.0f} {c:.0f} {d:.0f}" fill="none" stroke="#94a3b8" stroke-width="1.4"{DASHES[line_of(family.nodes[child], role)]}><title>{html.escape(role)}</title></path>')
    for digest, (x, y) in at.boxes.items():
        node = family.nodes[digest]
        color = COLORS.get(node.kind, "#64748b")
        parts.append(f'<g class="node" data-id="{html.escape(digest)}"><title>{html.escape(f"{node.label}: {node.kind} {digest}")}</title><rect x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="7" fill="#fff" stroke="{color}" stroke-width="1.6"/>')
        for i, line in enumerate(told(node)):
            weight = ' font-weight="600"' if i == 0 else ""
            parts.append(f'<text x="{x + 10:.0f}" y="{y + 17 + 14.5 * i:.0f}" fill="{color if i != 1 else "#475569"}"{weight} font-size="{12 if i == 0 else 10.5}">{html.escape(_short(line, 25 if i == 0 else 28))}</text>')
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def draw_png(family: Family, file: Path) -> None:
    """The same as a picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    at = placed(family)
    with mpl.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(max(4, at.width / 90), max(2, at.height / 90)), dpi=180)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, at.width)
        axes.set_ylim(at.height, 0)
        axes.set_axis_off()
        for parent, child, role in at.edges:
            (x1, y1), (x2, y2) = at.boxes[parent], at.boxes[child]
            a, b, c, d = x1 + BOX_W / 2, y1 + BOX_H, x2 + BOX_W / 2, y2
            curve = Curve([(a, b), (a, b + 24), (c, d - 24), (c, d)], [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
            axes.add_patch(PathPatch(curve, fill=False, edgecolor="#94a3b8", linewidth=1, linestyle=line_of(family.nodes[child], role)))
        for digest, (x, y) in at.boxes.items():
            node = family.nodes[digest]
            color = COLORS.get(node.kind, "#64748b")
            axes.add_patch(FancyBboxPatch((x + 3, y + 3), BOX_W - 6, BOX_H - 6, boxstyle="round,pad=3", facecolor="white", edgecolor=color, linewidth=1.2))
            for i, line in enumerate(told(node)):
                axes.text(x + 9, y + 16 + 14.5 * i, _short(line, 24 if i == 0 else 27), color=color if i != 1 else "#475569", fontsize=7 if i == 0 else 6, fontweight="bold" if i == 0 else "normal", parse_math=False)
        figure.savefig(file, metadata={"Software": None})


def draw_mermaid(family: Family) -> str:
    """As Mermaid, which GitHub and the Hub draw in Markdown."""
    names = {digest: f"n{number}" for number, digest in enumerate(family.nodes)}

    def safe(text: str) -> str:
        return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")

    arrows = {"solid": "-->", "dashed": "-.->", "dotted": "-.->"}
    lines = ["graph TD", *(f'  {names[node.digest]}["{"<br/>".join(map(safe, told(node)))}"]' for node in family.nodes.values())]
    lines += [f'  {names[parent]} {arrows[line_of(node, role)]}|"{safe(role)}"| {names[node.digest]}' for node in family.nodes.values() for role, parent in node.parents if parent in names]
    lines += [f"  style {names[node.digest]} stroke:{COLORS.get(node.kind, '#64748b')}" for node in family.nodes.values()]
    return "\n".join(lines) + "\n"


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
