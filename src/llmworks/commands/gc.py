"""`llmworks gc`: remove unused artifacts."""

from __future__ import annotations

import argparse

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import get_workspace
from llmworks.core.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks gc`."""
    parser = new_parser("gc", "Remove artifacts that are neither named nor ancestors of a named artifact.")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    parser.add_argument("--scratch", action="store_true", help="also remove checkpoints of interrupted steps")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks gc`."""
    workspace = get_workspace(args)
    if not workspace.store.is_dir():
        raise UserError(f"{workspace.root}: not a workspace; set one with --workspace")
    removed = workspace.collect(scratch=args.scratch, dry_run=args.dry_run)
    if args.json:
        print_json([{"path": str(p), "bytes": n} for p, n in removed])
        return
    for path, size in removed:
        print_line(f"{'would remove' if args.dry_run else 'removed'}  {relative_path(path)}  {size / 1e6:.1f} MB")
    print_line(f"{len(removed)} items, {sum(n for _, n in removed) / 1e6:.1f} MB")
