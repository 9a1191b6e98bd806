"""`llmworks tune evolve`: search the parameters of a merge by CMA-ES."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session, print_status


def build_parser() -> Parser:
    """Return the parser of `llmworks tune evolve`."""
    parser = new_parser(
        "tune evolve",
        "Search the parameters of a merge by CMA-ES: each attempt is merged and evaluated; the best is kept and"
        " evaluated on held-out tasks.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="mergekit's YAML; weights, densities, t and lambda are searched, starting from its values",
    )
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAMES",
        help="comma-separated suites or tasks; their mean score is maximized",
    )
    parser.add_argument(
        "--holdout-suite",
        default="",
        metavar="NAMES",
        help="held-out suites or tasks, on which parents and child are evaluated at the end",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="evaluate only the first N rows of each task"
    )
    parser.add_argument("--attempts", type=int, default=40, metavar="N", help="minimum number of merges (default 40)")
    parser.add_argument("--population", type=int, default=8, metavar="N", help="merges per generation (default 8)")
    parser.add_argument(
        "--gradient",
        type=int,
        default=1,
        metavar="N",
        help="number of points over the layers for weights and t (default 1)",
    )
    parser.add_argument("--negative", action="store_true", help="allow negative weights")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="name of the report")
    parser.add_argument("--out-model", type=Path, metavar="NAME", help="name of the best merge")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tune evolve FILE --suite NAMES`."""
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import resolve_items
    from llmworks.merge.plan.config import MergeConfig
    from llmworks.workflows.evolve import EvolutionJob, run_evolution
    from llmworks.workflows.merge_file import read_documents, resolve_models

    for name in (args.out, args.out_model):
        if name is not None:
            check_out(name)
    documents, session = read_documents(args.file, args.set), create_session(args)
    config = documents[0].config
    if len(documents) > 1 or not isinstance(config, MergeConfig):
        raise UserError(
            f"{args.file}: must contain one merge, it contains {'several' if len(documents) > 1 else 'experts'}"
        )
    models = resolve_models(config, {}, session)
    held = resolve_items(args.holdout_suite, args.limit) if args.holdout_suite else ()
    job = EvolutionJob(
        args.file.stem,
        config,
        models,
        session,
        resolve_items(args.suite, args.limit),
        held,
        args.attempts,
        args.population,
        args.gradient,
        args.negative,
        say=print_status,
    )
    page, child = run_evolution(job)
    for name, artifact in ((args.out, page), (args.out_model, child)):
        if name is not None:
            session.workspace.link_out(name, artifact)
    report = page.read()
    if args.json:
        print_json(
            {"report": str(page.path), "model": str(child.path), "best": report["best"], "scores": report["scores"]}
        )
        return
    print_line(
        f"\nBest: {report['best']['score']:.4g} "
        f" {'  '.join(f'{name} {value:g}' for name, value in report['best']['values'].items())}\nModel:"
        f" {relative_path(args.out_model if args.out_model is not None else child.path)}\nReport:"
        f" {relative_path(page.path / 'report.html')}"
    )
