"""`llmworks tune frontier`: quantize a model by many methods, and compare them."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session, print_status


def build_parser(name: str = "tune frontier", methods: str = "", suite: str = "") -> Parser:
    """Return the parser of `llmworks tune frontier`, and of its aliases with other defaults."""
    parser = new_parser(
        name,
        "Quantize a model by many methods, and compare size, quality loss, speed and skills. Resumes after an"
        " interruption.",
    )
    parser.add_argument("model")
    parser.add_argument(
        "--data",
        required=True,
        metavar="REF",
        help="conversations or documents of the model's domain, for calibration and held-out evaluation",
    )
    parser.add_argument(
        "--methods",
        default=methods,
        metavar="NAMES",
        help=(
            "comma-separated methods or prefixes of their names (gptq, gguf-q4 ...); default: all"
            if not methods
            else "comma-separated GGUF types or prefixes; default: all"
        ),
    )
    parser.set_defaults(only=methods)
    parser.add_argument(
        "--suite",
        default=suite,
        metavar="NAMES",
        help="comma-separated suites or tasks on which all are evaluated; default: none",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="evaluate only the first N rows of each task"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="MB",
        help="maximum file size in megabytes: the model with the lowest KL divergence within it is recommended",
    )
    parser.add_argument(
        "--num-calibration-samples",
        type=int,
        default=128,
        metavar="N",
        help="calibration samples of 512 tokens (default 128)",
    )
    parser.add_argument(
        "--eval-samples", type=int, default=16, metavar="N", help="held-out samples of 512 tokens (default 16)"
    )
    parser.add_argument("--out", type=Path, help="link to the report to create")
    parser.add_argument("--out-model", type=Path, metavar="NAME", help="link to the recommended model to create")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tune frontier MODEL --data REF`, and `autogguf`."""
    from llmworks.core.artifact import Dataset, Model
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import resolve_items
    from llmworks.workflows.autoquant import QuantizationJob, select_methods
    from llmworks.workflows.autoquant import frontier as run

    for name in (args.out, args.out_model):
        if name is not None:
            check_out(name)
    session, methods = create_session(args), select_methods([name for name in args.methods.split(",") if name])
    strange = next((name for name in methods if not name.startswith(args.only)), None)
    if strange is not None:
        raise UserError(f"autogguf supports GGUF files only, not {strange}; use tune frontier")
    model, data = session.load(args.model), session.load(args.data)
    if not isinstance(model, Model):
        raise UserError(f"{args.model}: is a {model.kind}, not a model")
    if not isinstance(data, Dataset):
        raise UserError(f"{args.data}: is a {data.kind}; --data needs conversations or documents of the model's domain")
    if args.num_calibration_samples < 1 or args.eval_samples < 1:
        raise UserError("--num-calibration-samples and --eval-samples must be greater than 0")
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit must be greater than 0")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        raise UserError(f"--budget {args.budget:g}: must be a number of megabytes greater than 0")
    items = resolve_items(args.suite, args.limit) if args.suite else ()
    job = QuantizationJob(
        model, data, session, items, args.num_calibration_samples, args.eval_samples, say=print_status
    )
    page, chosen = run(job, methods, None if args.budget is None else args.budget * 1e6)
    for name, artifact in ((args.out, page), (args.out_model, chosen)):
        if name is not None and artifact is not None:
            session.workspace.link_out(name, artifact)
    report = page.read()
    if args.json:
        print_json(
            {
                "report": str(page.path),
                "recommended": report["recommended"]["name"],
                "model": str(chosen.path) if chosen else None,
                **report["metrics"],
            }
        )
        return
    best = report["recommended"]
    print_line(
        f"\n{best['name']}: {best['bytes'] / 1e6:,.1f} MB, KL divergence {best['kl']:.4f} nats per token"
        + (f"\nModel: {relative_path(args.out_model if args.out_model is not None else chosen.path)}" if chosen else "")
        + f"\nReport: {relative_path(page.path / 'report.html')}"
    )
