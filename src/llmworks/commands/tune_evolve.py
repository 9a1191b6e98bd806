"""`llmworks tune evolve`: search the numbers of a merge by CMA-ES."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import as_json, out, short
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import session_of, tell


def build_parser() -> Parser:
    """The arguments of `llmworks tune evolve`."""
    parser = new_parser(
        "tune evolve",
        "The numbers of a merge by CMA-ES: each attempt is merged and asked; the best is kept, and asked other tasks,"
        " too.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="mergekit's YAML; its weights, densities, t and lambda are searched from the values that it has",
    )
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAMES",
        help="suites or tasks with commas between, by whose mean score it is searched",
    )
    parser.add_argument(
        "--holdout-suite", default="", metavar="NAMES", help="others that parents and child are asked at the end"
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument("--attempts", type=int, default=40, metavar="N", help="merges at least (default 40)")
    parser.add_argument("--population", type=int, default=8, metavar="N", help="merges of a generation (default 8)")
    parser.add_argument(
        "--gradient",
        type=int,
        default=1,
        metavar="N",
        help="weights and t at so many points over the layers, in place of one",
    )
    parser.add_argument("--negative", action="store_true", help="weights may be below 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="name of the page")
    parser.add_argument("--out-model", type=Path, metavar="NAME", help="name of the best merge")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tune evolve FILE --suite NAMES`."""
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import items_of
    from llmworks.merge.plan.config import MergeConfig
    from llmworks.workflows.evolve import Evolution, evolution
    from llmworks.workflows.merge_file import found_models, read

    for name in (args.out, args.out_model):
        if name is not None:
            check_out(name)
    documents, session = read(args.file, args.set), session_of(args)
    config = documents[0].config
    if len(documents) > 1 or not isinstance(config, MergeConfig):
        raise UserError(
            f"{args.file}: one merge is evolved, this holds {'several' if len(documents) > 1 else 'experts'}"
        )
    models = found_models(config, {}, session)
    held = items_of(args.holdout_suite, args.limit) if args.holdout_suite else ()
    job = Evolution(
        args.file.stem,
        config,
        models,
        session,
        items_of(args.suite, args.limit),
        held,
        args.attempts,
        args.population,
        args.gradient,
        args.negative,
        say=tell,
    )
    page, child = evolution(job)
    for name, artifact in ((args.out, page), (args.out_model, child)):
        if name is not None:
            session.workspace.link_out(name, artifact)
    told = page.read()
    if args.json:
        as_json({"report": str(page.path), "model": str(child.path), "best": told["best"], "scores": told["scores"]})
        return
    out(
        f"\nBest: {told['best']['score']:.4g} "
        f" {'  '.join(f'{name} {value:g}' for name, value in told['best']['values'].items())}\nModel:"
        f" {short(args.out_model if args.out_model is not None else child.path)}\nReport: {short(page.path / 'report.html')}"
    )
