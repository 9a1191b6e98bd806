"""`llmworks lazymerge`: write a merge's YAML, merge, and evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import print_json, print_line, print_table, relative_path
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session, print_status


def build_parser() -> Parser:
    """Return the parser of `llmworks lazymerge`."""
    parser = new_parser(
        "lazymerge",
        "Write mergekit's YAML for some models, merge them, evaluate parents and child on a suite of tasks, and"
        " write the child's model card.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="paths, names in the workspace, asset:NAME, ORG/NAME on the Hub, MODEL+ADAPTER",
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
        help="base model, for methods that use task vectors; for slerp one of the two models",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="weights of the models without the base; default: equal"
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="fraction of the delta parameters that is kept, for sparsifying methods (default 0.5)",
    )
    parser.add_argument("--t", type=float, default=0.5, help="interpolation factor of slerp and nearswap (default 0.5)")
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="NAMES",
        help="comma-separated suites or tasks; empty: none (default quick)",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="evaluate only the first N rows of each task"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="name of the merged model")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="also write a directory to upload to the Hub: weights and a model card with the scores",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks lazymerge --models A B --method ties`."""
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import resolve_items
    from llmworks.workflows.lazymerge import LazyMergeJob, build_merge_config, export, list_evaluations
    from llmworks.workflows.lazymerge import lazymerge as run
    from llmworks.workflows.merge_file import resolve_models

    check_out(args.out)
    if args.export is not None and args.export.exists() and (not args.export.is_dir() or any(args.export.iterdir())):
        raise UserError(f"{args.export}: already exists and is not empty; choose another --export")
    session = create_session(args)
    config = build_merge_config(args.method, args.models, args.base, args.weights or (), args.density, args.t)
    models = resolve_models(config, {}, session)
    items = resolve_items(args.suite, args.limit) if args.suite else ()
    job = LazyMergeJob(config, models, items, session, say=print_status)
    child, board = run(job, args.out.name)
    session.workspace.link_out(args.out, child)
    if args.export is not None:
        export(child, board, args.out.name, args.export, list_evaluations(child, session.workspace))
    if args.json:
        print_json(
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
        print_line("")
        print_table(
            ("model", *tasks), [(who, *(one.get(task, "–") for task in tasks)) for who, one in job.scores.items()]
        )
    print_line(
        f"\nModel: {args.out}"
        + (f"\nLeaderboard: {relative_path(board.path / 'report.html')}" if board else "")
        + (f"\nTo upload: huggingface-cli upload ORG/{args.out.name} {args.export}" if args.export else "")
    )
