"""`llmworks autoeval`: evaluate models on a suite of tasks and build a leaderboard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session, print_status
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Adapter, Model, Report


def build_parser() -> Parser:
    """Return the parser of `llmworks autoeval`."""
    from llmworks.evaluate.suites import load_suites

    suite_help = "; ".join(f"{name}: {suite.what}" for name, suite in load_suites().items())
    parser = new_parser(
        "autoeval",
        "Evaluate models on a suite of tasks, and build a leaderboard of all evaluations in the workspace.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="NAMES",
        help=f"comma-separated suites or tasks; {suite_help}".replace("%", "%%"),
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="evaluate only the first N rows of each task"
    )
    parser.add_argument("--out", type=Path, help="link to the leaderboard to create")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks autoeval MODEL ... [--suite NAMES]`."""
    from llmworks.core.artifact import Adapter, Model
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import resolve_items
    from llmworks.workflows.autoeval import autoeval

    if args.out is not None:
        check_out(args.out)
    session, items = create_session(args), resolve_items(args.suite, args.limit)
    models: list[Model | Adapter] = []
    for ref in args.models:
        model = session.load(ref)
        if not isinstance(model, (Model, Adapter)):
            raise UserError(f"{model.name}: is a {model.kind}, not a model")
        models.append(model)
    found = autoeval(models, items, session, print_status)
    board = found.leaderboard
    if args.out is not None:
        session.workspace.link_out(args.out, board)
    if args.json:
        print_json(
            {
                "board": str(board.path),
                "digest": board.digest,
                "scores": [_score_to_json(r) for r in found.reports],
                "failures": [{"model": m, "task": t, "why": w} for m, t, w in found.failures],
            }
        )
        return
    for name, task, why in found.failures:
        print_status(f"  skipped: {name} on {task}: {why}")
    print_line(
        f"\nLeaderboard: {relative_path(board.path / 'report.html')}\nModel card section:"
        f" {relative_path(board.path / 'model-card.md')}"
    )


def _score_to_json(report: Report) -> dict[str, Any]:
    """Return an evaluation's JSON summary."""
    return {
        "task": report.about.get("task"),
        "model": report.about.get("model"),
        "path": str(report.path),
        **{k: report.metrics[k] for k in ("metric", "score", "low", "high", "samples")},
    }
