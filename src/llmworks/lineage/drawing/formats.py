"""Draw a lineage graph: as a text tree for the terminal, as a layered graph in SVG, PNG and Mermaid.

Depends only on `family.Family` and the layout; the searchable page is in `page.py`.
"""

from __future__ import annotations

import html
from pathlib import Path

from llmworks.lineage.drawing.layout import BOX_H, BOX_W, compute_layout
from llmworks.lineage.family import Family, LineageNode

INFERRED_PREFIX = "by its weights: "
COLORS = {
    "model": "#2563eb",
    "adapter": "#7c3aed",
    "dataset": "#059669",
    "tokenizer": "#0891b2",
    "index": "#b45309",
    "report": "#64748b",
}


def draw_text(family: Family) -> str:
    """Draw the lineage as an indented text tree; a node with several parents is listed below its primary parent, the
    other parents are named in its line.
    """
    lines: list[str] = []
    primary = {node.digest: _primary_parent(node) for node in family.nodes.values()}

    def visit(node: LineageNode, prefix: str, last: bool, top: bool) -> None:
        others = [family.nodes[p].label for _, p in node.parents if p != primary[node.digest] and p in family.nodes]
        joint = "" if top else ("└─ " if last else "├─ ")
        made = (
            f"  [{' '.join([node.stage, *_describe_result(node)])}]"
            if node.stage
            else f"  [external{f': {node.ref}' if node.ref else ''}]"
        )
        extra = f"  + {', '.join(dict.fromkeys(others))}" if others else ""
        notes = [role for role, digest in node.parents if digest in family.nodes and edge_style(node, role) == "dotted"]
        if len(notes) > 1 and all(
            role.startswith(INFERRED_PREFIX) for role in notes
        ):  # list all parents with their shares
            notes = [
                INFERRED_PREFIX
                + "; ".join(
                    f"{role.removeprefix(INFERRED_PREFIX)} {family.nodes[digest].label}"
                    for role, digest in node.parents
                    if role in notes and digest in family.nodes
                )
            ]
        own = next((role for role, digest in node.parents if digest == primary[node.digest]), "")
        by = f"  ({notes[0]})" if notes else "  (tokenizer only)" if own == "tokenizer" and node.kind == "model" else ""
        digest = "" if node.digest.startswith("claimed:") else f" {node.digest[:12]}"
        lines.append(f"{prefix}{joint}{node.label}  {node.kind}{digest}{made}{by}{extra}{_format_metrics(node)}")
        below = [child for child in family.nodes.values() if primary[child.digest] == node.digest]
        for i, child in enumerate(below):
            visit(child, prefix + ("" if top else ("   " if last else "│  ")), i == len(below) - 1, False)

    for node in family.nodes.values():
        if primary[node.digest] not in family.nodes:
            visit(node, "", True, True)
    return "\n".join(lines)


def _primary_parent(node: LineageNode) -> str:
    """Return the primary parent: model before adapter before data; otherwise the last."""
    for role in ("model", "adapter", "data"):
        for name, digest in node.parents:
            if name == role:
                return digest
    return node.parents[-1][1] if node.parents else ""


def _format_metrics(node: LineageNode) -> str:
    if node.artifact is None or node.artifact.manifest is None:
        return ""
    numbers = [
        (k, v) for k, v in node.artifact.metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    shown = [f"{k} {v:.4g}" for k, v in numbers if k in ("score", "difference", "rows", "loss")]
    return f"  ({', '.join(shown)})" if shown else ""


def edge_style(node: LineageNode, role: str) -> str:
    """Return the edge style: solid where reproducible, dashed where declared, dotted where claimed by a file or
    inferred from weights.
    """
    return (
        "dotted"
        if role.startswith(INFERRED_PREFIX) or " says: " in role
        else "dashed"
        if node.derivation == "declared"
        else "solid"
    )


DASHES = {"solid": "", "dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.5 3"'}


def label_node(node: LineageNode) -> tuple[str, str, str]:
    """Return the text lines of a node's box."""
    return (
        node.label,
        " ".join([node.stage or node.ref or "external", *_describe_result(node)]),
        f"{node.kind} {node.digest[:8] if not node.digest.startswith('claimed:') else 'known by name only'}",
    )


def _describe_result(node: LineageNode) -> list[str]:
    """Describe a stage's result: merge method, quantization bits or type."""
    if node.artifact is None or node.artifact.manifest is None or not node.stage.startswith(("merge", "quantize.")):
        return []
    about = node.artifact.about
    found = [
        str(about[key]) for key in ("method", "type") if about.get(key) and str(about[key]) != node.stage.split(".")[-1]
    ]
    bits = about.get("average") or about.get("bits")
    return [
        *found,
        *([f"{bits:g} bits"] if isinstance(bits, (int, float)) else []),
        *(["allocated"] if about.get("allocated") else []),
    ]


def draw_svg(family: Family) -> str:
    """Draw the graph as SVG; box colors by kind, edge styles by `edge_style`."""
    at = compute_layout(family)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{at.width:.0f}" height="{at.height:.0f}" viewBox="0 0'
        f' {at.width:.0f} {at.height:.0f}" font-family="system-ui,sans-serif" font-size="12">'
    ]
    for edge in at.edges:
        way = " ".join(command + " ".join(f"{one:.0f}" for one in numbers) for command, numbers in edge.path)
        parts.append(
            f'<path class="edge" data-from="{html.escape(edge.parent)}" data-to="{html.escape(edge.child)}" d="{way}"'
            ' fill="none" stroke="#94a3b8"'
            f' stroke-width="1.4"{DASHES[edge_style(family.nodes[edge.child], edge.role)]}>'
            f"<title>{html.escape(edge.role)}</title></path>"
        )
    for digest, (x, y) in at.boxes.items():
        node = family.nodes[digest]
        color = COLORS.get(node.kind, "#64748b")
        parts.append(
            '<g class="node"'
            f' data-id="{html.escape(digest)}"><title>{html.escape(f"{node.label}: {node.kind} {digest}")}</title><rect'
            f' x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="7" fill="#fff" stroke="{color}"'
            ' stroke-width="1.6"/>'
        )
        for i, line in enumerate(label_node(node)):
            weight = ' font-weight="600"' if i == 0 else ""
            parts.append(
                f'<text x="{x + 10:.0f}" y="{y + 17 + 14.5 * i:.0f}" fill="{color if i != 1 else "#475569"}"{weight}'
                f' font-size="{12 if i == 0 else 10.5}">{html.escape(_shorten(line, 25 if i == 0 else 28))}</text>'
            )
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def draw_png(family: Family, file: Path) -> None:
    """Draw the graph as PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    at = compute_layout(family)
    with mpl.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(max(4, at.width / 90), max(2, at.height / 90)), dpi=180)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, at.width)
        axes.set_ylim(at.height, 0)
        axes.set_axis_off()
        codes = {"M": [Curve.MOVETO], "L": [Curve.LINETO], "C": [Curve.CURVE4] * 3}
        for edge in at.edges:
            points = [(numbers[i], numbers[i + 1]) for _, numbers in edge.path for i in range(0, len(numbers), 2)]
            curve = Curve(points, [code for command, _ in edge.path for code in codes[command]])
            axes.add_patch(
                PathPatch(
                    curve,
                    fill=False,
                    edgecolor="#94a3b8",
                    linewidth=1,
                    linestyle=edge_style(family.nodes[edge.child], edge.role),
                )
            )
        for digest, (x, y) in at.boxes.items():
            node = family.nodes[digest]
            color = COLORS.get(node.kind, "#64748b")
            axes.add_patch(
                FancyBboxPatch(
                    (x + 3, y + 3),
                    BOX_W - 6,
                    BOX_H - 6,
                    boxstyle="round,pad=3",
                    facecolor="white",
                    edgecolor=color,
                    linewidth=1.2,
                )
            )
            for i, line in enumerate(label_node(node)):
                axes.text(
                    x + 9,
                    y + 16 + 14.5 * i,
                    _shorten(line, 24 if i == 0 else 27),
                    color=color if i != 1 else "#475569",
                    fontsize=7 if i == 0 else 6,
                    fontweight="bold" if i == 0 else "normal",
                    parse_math=False,
                )
        figure.savefig(file, metadata={"Software": None})


def draw_mermaid(family: Family) -> str:
    """Draw the graph as Mermaid, which GitHub and the Hub render in Markdown."""
    names = {digest: f"n{number}" for number, digest in enumerate(family.nodes)}

    def safe(text: str) -> str:
        return (
            text.replace("&", "&amp;")
            .replace('"', "&quot;")
            .replace("<", "&lt;")
            .replace(">", "&gt;")
            .replace("\n", " ")
        )

    arrows = {"solid": "-->", "dashed": "-.->", "dotted": "-.->"}
    lines = [
        "graph TD",
        *(f'  {names[node.digest]}["{"<br/>".join(map(safe, label_node(node)))}"]' for node in family.nodes.values()),
    ]
    lines += [
        f'  {names[parent]} {arrows[edge_style(node, role)]}|"{safe(role)}"| {names[node.digest]}'
        for node in family.nodes.values()
        for role, parent in node.parents
        if parent in names
    ]
    lines += [
        f"  style {names[node.digest]} stroke:{COLORS.get(node.kind, '#64748b')}" for node in family.nodes.values()
    ]
    return "\n".join(lines) + "\n"


def _shorten(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
