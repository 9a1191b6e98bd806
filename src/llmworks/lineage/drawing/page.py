"""Draw a lineage graph as one self-contained HTML page: pan and zoom, search, and details of an artifact on click.

Depends only on `family.Family` and its drawing.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmworks.lineage.drawing.formats import COLORS, draw_svg
from llmworks.lineage.family import Family, LineageNode

STYLE = "\n" + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = "\n" + Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def draw_page(family: Family, title: str, licenses: Mapping[str, str], warnings: Sequence[str]) -> str:
    """Render the page. `licenses`: by digest; `warnings`: lines above the drawing."""
    data = {digest: _collect_details(family, node, licenses) for digest, node in family.nodes.items()}
    kinds = [kind for kind in COLORS if any(node.kind == kind for node in family.nodes.values())]
    legend = (
        "".join(f'<span><i style="border-color:{COLORS[kind]}"></i>{kind}</span>' for kind in kinds)
        + "<span>solid: reproducible; dashed: declared; dotted: claimed by a file, or inferred from weights</span>"
    )
    warning_block = (
        f'<div class="warn">{"".join(f"<div>{html.escape(line)}</div>" for line in warnings)}</div>' if warnings else ""
    )
    script = json.dumps(data, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{html.escape(title)}</h1><p>{len(family.nodes)} artifacts</p>"
        '<input type="search" placeholder="search names, stages, digests" aria-label="search">'
        f'<button id="fit">fit</button><div class="key">{legend}</div></header>{warning_block}'
        f'<main><div id="view">{draw_svg(family)}</div><aside></aside></main>'
        f'<script type="application/json" id="data">{script}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _collect_details(family: Family, node: LineageNode, licences: Mapping[str, str]) -> dict[str, Any]:
    """Collect a node's details for the page and its searchable text."""
    manifest = node.artifact.manifest if node.artifact is not None else None
    facts: dict[str, Any] = {
        "kind": node.kind,
        "digest": node.digest,
        "made by": node.stage or "external",
        **({"reference": node.ref} if node.ref else {}),
        **({"licence": licences[node.digest]} if node.digest in licences else {}),
    }
    more: dict[str, Any] = {}
    if manifest is not None:
        if manifest.stage:
            facts |= {
                "derivation": manifest.derivation,
                "when": f"{manifest.started} to {manifest.finished[:19]}",
                "seed": manifest.seed,
                "threads": manifest.threads,
            }
        more = {
            "Metrics": manifest.metrics,
            "About": manifest.about,
            "Config": {name: value for name, value in manifest.config.items() if value not in (None, {}, [])},
            "Files": {
                name: f"{entry.bytes:,} bytes, {entry.sha256[:12]}" for name, entry in list(manifest.files.items())[:60]
            },
        }
    children = [(role, child.digest) for role, child in family.children(node.digest)]
    text = " ".join([node.label, node.stage, node.ref, node.kind, node.digest, licences.get(node.digest, "")]).lower()
    return {
        "name": node.label,
        "facts": facts,
        "parents": [one for one in node.parents if one[1] in family.nodes],
        "children": children,
        "more": more,
        "text": text,
    }
