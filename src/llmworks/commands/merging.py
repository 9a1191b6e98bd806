"""What `merge` prints. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import sys

from llmworks.commands.making import say_made
from llmworks.commands.output import as_json, out, short, table, workspace_of


def merge(args: argparse.Namespace) -> None:
    """`llmworks merge FILE --out NAME`."""
    from llmworks.core.artifact import Model
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.merge.plan.plan import spans
    from llmworks.runtime.references import resolve
    from llmworks.workflows.merge_file import merge_file, plan_file, read, unnamed

    if args.methods:
        _methods()
        return
    if args.file is None:
        raise UserError("a file is missing: mergekit's YAML (llmworks merge FILE --out NAME)")
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
    spare = unnamed(documents, given)
    if spare:
        raise UserError(
            f"--models {spare}=...: {args.file} names no model {spare!r}; it names"
            f" {', '.join(dict.fromkeys(name for document in documents for name in document.config.named()))}"
        )
    if args.plan:
        plan = plan_file(documents, workspace, given)
        read_bytes, written = plan.sizes()
        if args.json:
            as_json(
                {
                    "tensors": len(plan.jobs),
                    "read_bytes": read_bytes,
                    "written_bytes": written,
                    "seconds": round(plan.seconds(), 1),
                    "unused": list(plan.unused),
                }
            )
            return
        names = list(dict.fromkeys(name for job in plan.jobs for name, _ in job.sources))
        out(f"{plan.method.name} of {', '.join(names)}\n")
        table(
            ("stack", "layers", "each layer's first source"),
            [(stack, len(origins), ", ".join(spans(origins))) for stack, origins in plan.layers.items()],
        )
        out(
            f"\n{len(plan.jobs)} tensors; {read_bytes / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write; about"
            f" {max(1, round(plan.seconds())):,} s on one core, and what the disk takes."
            + (f"\nThe method has no parameter {', '.join(plan.unused)}, which the file gives." if plan.unused else "")
        )
        return
    if args.out is None:
        raise UserError("--out is missing: the name of the result")
    check_out(args.out)
    outcome = merge_file(
        documents,
        workspace,
        given=given,
        seed=args.seed,
        quiet=args.quiet,
        say=lambda line: print(f"  {line}", file=sys.stderr),
    )
    workspace.link_out(args.out, outcome.artifact)
    if args.json:
        as_json(
            {
                "path": str(outcome.artifact.path),
                "digest": outcome.artifact.digest,
                "made": outcome.made,
                "metrics": outcome.artifact.metrics,
            }
        )
        return
    say_made("merge", args.out, outcome)


def _methods() -> None:
    """All methods with their parameters: of the tensor, or of each model, with what they are where none is given."""
    from llmworks.merge.plan.catalogue import METHODS
    from llmworks.merge.plan.parameters import REQUIRED, Parameter

    def said(one: Parameter) -> str:
        default = "none" if one.default is None else str(one.default).lower()
        of = "" if one.of == "tensor" else ", of each model"
        return f"{one.name} ({'needed' if one.default is REQUIRED else default}{of})"

    table(
        ("merge_method", "base_model", "parameters (default)"),
        [
            (
                name,
                {"required": "needed", "optional": "may be", "none": "any model"}[how.base],
                ", ".join(map(said, how.parameters)) or "none",
            )
            for name, how in METHODS.items()
        ],
    )


def lazymerge(args: argparse.Namespace) -> None:
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
    workspace = workspace_of(args)
    config = recipe_of(args.method, args.models, args.base, args.weights or (), args.density, args.t)
    models = found_models(config, {}, workspace)
    job = Lazy(
        config,
        models,
        items_of(args.suite, args.limit) if args.suite else (),
        workspace,
        args.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        quiet=args.quiet,
    )
    child, board = run(job, args.out.name)
    workspace.link_out(args.out, child)
    if args.export is not None:
        export(child, board, args.out.name, args.export, scores_of(child, workspace))
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
