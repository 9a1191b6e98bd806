"""What `merge` prints. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import sys

from llmworks.commands.making import say_made
from llmworks.commands.output import as_json, out, short, table, workspace_of


def merge(args: argparse.Namespace) -> None:
    """`llmworks merge FILE --out NAME`."""
    from llmworks.artifact import Model
    from llmworks.errors import UserError
    from llmworks.merges import merge_file, plan_file, read
    from llmworks.references import resolve
    from llmworks.workspace import check_out

    documents, workspace = read(args.file, args.set), workspace_of(args)
    given: dict[str, Model] = {}
    for text in args.models:
        name, equals, ref = text.partition("=")
        if not (equals and name and ref):
            raise UserError(f"--models {text}: write it as NAME=REF, NAME as the file has it")
        found = resolve(ref, name=name, workspace=workspace)
        if not isinstance(found, Model):
            raise UserError(f"--models {text}: is a {found.kind}, not a model")
        given[name] = found
    if args.plan:
        plan = plan_file(documents, workspace, given)
        read_bytes, written = plan.sizes()
        if args.json:
            as_json({"tensors": len(plan.jobs), "read_bytes": read_bytes, "written_bytes": written, "seconds": round(plan.seconds(), 1), "unused": list(plan.unused)})
            return
        table(("stack", "layers"), [(stack, len(origins)) for stack, origins in plan.layers.items()])
        out(f"\n{len(plan.jobs)} tensors; {read_bytes / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write; about {plan.seconds():.0f} s on one core." + (f"\nThe method has no parameter {', '.join(plan.unused)}, which the file gives." if plan.unused else ""))
        return
    if args.out is None:
        raise UserError("--out is missing: the name of the result")
    check_out(args.out)
    outcome = merge_file(documents, workspace, given=given, seed=args.seed, quiet=args.quiet, say=lambda line: print(f"  {line}", file=sys.stderr))
    workspace.link_out(args.out, outcome.artifact)
    if args.json:
        as_json({"path": str(outcome.artifact.path), "digest": outcome.artifact.digest, "made": outcome.made, "metrics": outcome.artifact.metrics})
        return
    say_made("merge", args.out, outcome)


def lazymerge(args: argparse.Namespace) -> None:
    """`llmworks lazymerge --models A B --method ties`."""
    from llmworks.errors import UserError
    from llmworks.evaluate.suites import items_of
    from llmworks.lazymerges import Lazy, export, recipe_of, scores_of
    from llmworks.lazymerges import lazymerge as run
    from llmworks.merges import found_models
    from llmworks.workspace import check_out

    check_out(args.out)
    if args.export is not None and args.export.exists() and (not args.export.is_dir() or any(args.export.iterdir())):
        raise UserError(f"{args.export}: is there already, and is not empty; choose another --export")
    workspace = workspace_of(args)
    config = recipe_of(args.method, args.models, args.base, args.weights or (), args.density, args.t)
    models = found_models(config, {}, workspace)
    job = Lazy(config, models, items_of(args.suite, args.limit) if args.suite else (), workspace, args.seed, say=lambda line: print(line, file=sys.stderr, flush=True), quiet=args.quiet)
    child, board = run(job, args.out.name)
    workspace.link_out(args.out, child)
    if args.export is not None:
        export(child, board, args.out.name, args.export, scores_of(child, workspace))
    if args.json:
        as_json({"path": str(child.path), "digest": child.digest, "board": str(board.path) if board else None, "export": str(args.export) if args.export else None})
        return
    out(f"\nModel: {args.out}" + (f"\nLeaderboard: {short(board.path / 'report.html')}" if board else "") + (f"\nTo upload: huggingface-cli upload ORG/{args.out.name} {args.export}" if args.export else ""))
