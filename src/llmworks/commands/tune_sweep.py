"""`llmworks tune sweep`: search hyperparameters of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, add_workers, new_parser
from llmworks.commands.session import create_session, print_status


def build_parser() -> Parser:
    """Return the parser of `llmworks tune sweep`."""
    parser = new_parser(
        "tune sweep",
        "Search the best values of a recipe's config fields: each trial runs it with other values. Resumes after"
        " an interruption.",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "search",
        type=Path,
        help="YAML file: metric (STEP.METRIC), direction, fields (STEP.FIELD to choices, or low and high), trials",
    )
    parser.add_argument(
        "--trials", type=int, default=None, metavar="N", help="total number of trials, overrides the file's"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STEP.FIELD=VALUE",
        help="change a config field of a step in all trials",
    )
    add_workers(parser)
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tune sweep RECIPE SEARCH`."""
    from llmworks.tune.search.search_space import load_search
    from llmworks.workflows.sweep import sweep as run

    search = load_search(args.search)
    if args.trials is not None:
        search = type(search).model_validate(search.model_dump() | {"trials": args.trials})
    session = create_session(args)
    session.say = print_status
    found = run(args.recipe, search, session, args.set)
    data = found.read()
    if args.json:
        print_json({"report": str(found.path), "best": data["best"], **data["metrics"]})
        return
    sets = " ".join(f"--set {field}={value}" for field, value in data["best"].items())
    print_line(
        f"\nBest: {search.metric} {data['metrics']['score']:.4g}\n  llmworks run {args.recipe} {sets}\nReport:"
        f" {relative_path(found.path / 'report.html')}"
    )
