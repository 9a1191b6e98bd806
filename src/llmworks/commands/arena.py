"""`llmworks arena`: vote for the better of two answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.commands.output import print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Report


def build_parser() -> Parser:
    """Return the parser of `llmworks arena`."""
    parser = new_parser(
        "arena",
        "Vote in the terminal for the better of two anonymous answers.",
        json=False,
    )
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="evaluations of one generative task")
    parser.add_argument("--votes", type=Path, required=True, metavar="FILE", help="JSONL file to append votes to")
    parser.add_argument("--voter", default="", help="name of the voter; default: the user name")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and sides of the pairs")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks arena REPORT REPORT ... --votes FILE`."""
    import getpass

    from llmworks.core.artifact import Report
    from llmworks.evaluate.voting import collect_votes

    session = create_session(args)
    reports: list[Report] = []
    for ref in args.reports:
        found = session.load(ref)
        if not isinstance(found, Report):
            raise UserError(f"{ref}: is a {found.kind}, expected an evaluation (`llmworks evaluate`)")
        reports.append(found)
    count = collect_votes(reports, args.votes, args.voter or getpass.getuser(), args.seed, sys.stdin, sys.stdout)
    print_line(f"\n{count} votes in {args.votes}. Ratings: llmworks evaluate arena --votes {args.votes}")
