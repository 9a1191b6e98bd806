"""`llmworks diff`: compare two artifacts."""

from __future__ import annotations

import argparse

from llmworks.commands.output import print_json, print_line, print_table, shorten
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session


def build_parser() -> Parser:
    """Return the parser of `llmworks diff`."""
    parser = new_parser("diff", "Show which config fields, parents, files and metrics of two artifacts differ.")
    parser.add_argument("a")
    parser.add_argument("b")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks diff A B`."""
    from llmworks.lineage.diff import diff as compare

    session = create_session(args)
    a, b = session.load(args.a), session.load(args.b)
    rows = compare(a, b)
    if args.json:
        print_json([{"section": s, "field": f, "a": x, "b": y} for s, f, x, y in rows])
    elif not rows:
        print_line(f"{a.name} and {b.name} are identical")
    else:
        print_table(("", "field", a.name, b.name), [(s, f, shorten(x), shorten(y)) for s, f, x, y in rows])
