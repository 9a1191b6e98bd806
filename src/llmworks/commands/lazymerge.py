"""`llmworks lazymerge`: write the YAML of a merge, carry it out, score it."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import as_json, out, short, table
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import session_of, tell


def build_parser() -> Parser:
    """The arguments of `llmworks lazymerge`."""
    parser = new_parser(
        "lazymerge",
        "Write mergekit's YAML for some models, merge them, ask parents and child a suite of tasks, and write the"
        " child's card.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="paths, names in the workspace, asset:NAME, ORG/NAME of the Hub, MODEL+ADAPTER",
    )
    parser.add_argument(
        "--method",
        default="linear",
        help="linear, slerp, ties, dare_ties, task_arithmetic, model_stock, karcher ... (llmworks stages merge)",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="MODEL",
        help="what the models were tuned from, for methods that measure from it; of slerp one of the two",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of the models beside the base; default: the same for all"
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="share of changes that is kept, of methods that drop some (default 0.5)",
    )
    parser.add_argument("--t", type=float, default=0.5, help="of slerp and nearswap (default 0.5)")
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="NAMES",
        help="suites or tasks with commas between; empty: none (default quick)",
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="name of the child")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="also a directory to upload to the Hub: weights, and a card with the scores",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks lazymerge --models A B --method ties`."""
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import items_of
    from llmworks.workflows.lazymerge import Lazy, export, recipe_of, scores_of
    from llmworks.workflows.lazymerge import lazymerge as run
    from llmworks.workflows.merge_file import found_models

    check_out(args.out)
    if args.export is not None and args.export.exists() and (not args.export.is_dir() or any(args.export.iterdir())):
        raise UserError(f"{args.export}: is there already, and is not empty; choose another --export")
    session = session_of(args)
    config = recipe_of(args.method, args.models, args.base, args.weights or (), args.density, args.t)
    models = found_models(config, {}, session)
    items = items_of(args.suite, args.limit) if args.suite else ()
    job = Lazy(config, models, items, session, say=tell)
    child, board = run(job, args.out.name)
    session.workspace.link_out(args.out, child)
    if args.export is not None:
        export(child, board, args.out.name, args.export, scores_of(child, session.workspace))
    if args.json:
        as_json(
            {
                "path": str(child.path),
                "digest": child.digest,
                "board": str(board.path) if board else None,
                "export": str(args.export) if args.export else None,
            }
        )
        return
    if job.scores:
        tasks = list(dict.fromkeys(task for one in job.scores.values() for task in one))
        out("")
        table(("model", *tasks), [(who, *(one.get(task, "–") for task in tasks)) for who, one in job.scores.items()])
    out(
        f"\nModel: {args.out}"
        + (f"\nLeaderboard: {short(board.path / 'report.html')}" if board else "")
        + (f"\nTo upload: huggingface-cli upload ORG/{args.out.name} {args.export}" if args.export else "")
    )
