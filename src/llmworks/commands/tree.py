"""`llmworks tree`: show the family tree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Artifact
    from llmworks.runtime.session import Session


def build_parser() -> Parser:
    """Return the parser of `llmworks tree`."""
    parser = new_parser("tree", "Show the family tree of the workspace, or of one artifact and its ancestors.")
    parser.add_argument("artifact", nargs="?")
    parser.add_argument(
        "--candidates",
        action="append",
        default=[],
        metavar="REF",
        help="possible parent models of the artifact, a model; compared by their weights",
    )
    parser.add_argument(
        "--models",
        action="store_true",
        help="show only models, adapters and tokenizers",
    )
    for kind, what in (
        ("html", "an HTML page with zoom and search"),
        ("svg", "an SVG drawing"),
        ("png", "a PNG image"),
        ("mermaid", "Mermaid, for Markdown"),
    ):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"also write it as {what}")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tree [ARTIFACT]`."""
    from llmworks.lineage.claims.license import find_license_conflicts
    from llmworks.lineage.drawing.formats import draw_mermaid, draw_png, draw_svg, draw_text
    from llmworks.lineage.drawing.page import draw_page
    from llmworks.workflows.family import build_workspace_family, collect_licenses

    session = create_session(args)
    workspace = session.workspace
    chosen = session.load(args.artifact) if args.artifact else None
    candidates = [session.load(ref) for ref in args.candidates]
    if candidates:
        _find_parents(session, chosen, candidates)
    family = build_workspace_family(workspace, *([chosen] if chosen is not None else []), *candidates)
    if chosen is not None:
        family = family.subgraph([chosen.digest])
    if args.models:
        family = family.filter_kinds("model", "adapter", "tokenizer")
    if not family.nodes:
        raise UserError(
            f"{workspace.root}: no artifacts here yet; run a recipe first (llmworks run recipes/quickstart.yaml)"
        )
    licences = collect_licenses(family)
    warnings = find_license_conflicts(family, licences)
    if args.json:
        nodes = [
            {
                "digest": n.digest,
                "kind": n.kind,
                "name": n.label,
                "stage": n.stage,
                "licence": licences.get(n.digest, ""),
                "parents": [{"role": r, "digest": d} for r, d in n.parents],
            }
            for n in family.nodes.values()
        ]
        print_json({"nodes": nodes, "warnings": warnings})
        return
    title = f"Family of {chosen.name}" if chosen is not None else "Family tree"
    for file, write in (
        (args.svg, lambda file: file.write_text(draw_svg(family), encoding="utf-8")),
        (args.png, lambda file: draw_png(family, file)),
        (args.mermaid, lambda file: file.write_text(draw_mermaid(family), encoding="utf-8")),
        (args.html, lambda file: file.write_text(draw_page(family, title, licences, warnings), encoding="utf-8")),
    ):
        if file:
            write(Path(file))
    print_line(draw_text(family))
    for line in warnings:
        print_line(f"licenses: {line}")


def _find_parents(session: Session, chosen: Artifact | None, candidates: Sequence[Artifact]) -> None:
    """Compare a model's weights with those of possible parents; the tree shows what is found."""
    from llmworks.core.artifact import Model

    strange = next((one for one in [chosen, *candidates] if not isinstance(one, Model)), None)
    if chosen is None:
        raise UserError(
            "--candidates: the model whose parents are searched is missing: llmworks tree MODEL --candidates REF"
        )
    if strange is not None:
        raise UserError(f"--candidates: {strange.name} is not a model")
    session.make("merge.find_parents", child=chosen, candidates=candidates)
