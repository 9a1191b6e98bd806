"""`llmworks merge FILE`: merge models by mergekit's YAML."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.commands.output import print_json, print_line, print_stage_result, print_table, stage_result_to_json
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session
from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Model
    from llmworks.merge.plan.plan import MergePlan
    from llmworks.runtime.session import Session


def build_parser() -> Parser:
    """Return the parser of `llmworks merge`."""
    parser = new_parser(
        "merge",
        "Merge models by mergekit's YAML. `llmworks stages merge` lists its keys; `llmworks merge STAGE --help`"
        " describes the other stages of the group.",
    )
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help=(
            "YAML: merge_method, models or slices, base_model, parameters ...; models are paths, names in the"
            " workspace, asset:NAME, ORG/NAME on the Hub, MODEL+ADAPTER"
        ),
    )
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="NAME=REF",
        help="reference for a model name in the file that is not a reference itself",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the file, as parameters.t=0.4",
    )
    parser.add_argument(
        "--plan", action="store_true", help="only show what would be read and written; reads headers only"
    )
    parser.add_argument("--methods", action="store_true", help="only list the merge methods with their parameters")
    parser.add_argument("--out", type=Path, metavar="NAME", help="link to the result to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the methods that drop parameters at random")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks merge FILE --out NAME`."""
    from llmworks.core.workspace import check_out
    from llmworks.workflows.merge_file import find_unused_model, merge_file, plan_file, read_documents

    if args.methods:
        _print_methods()
        return
    if args.file is None:
        raise UserError("the file is missing: mergekit's YAML (llmworks merge FILE --out NAME)")
    documents, session = read_documents(args.file, args.set), create_session(args)
    given = _load_models(args, session)
    spare = find_unused_model(documents, given)
    if spare:
        raise UserError(
            f"--models {spare}=...: {args.file} has no model {spare!r}; it has"
            f" {', '.join(dict.fromkeys(name for document in documents for name in document.config.model_names()))}"
        )
    if args.plan:
        _print_plan(plan_file(documents, session, given), args.json)
        return
    if args.out is None:
        raise UserError("--out is missing: the name of the result")
    check_out(args.out)
    outcome = merge_file(documents, session, given=given)
    session.workspace.link_out(args.out, outcome.artifact)
    if args.json:
        print_json(stage_result_to_json(outcome))
        return
    print_stage_result("merge", args.out, outcome)


def _load_models(args: argparse.Namespace, session: Session) -> dict[str, Model]:
    """Return the models of `--models NAME=REF`."""
    from llmworks.core.artifact import Model

    given: dict[str, Model] = {}
    for text in args.models:
        name, equals, ref = text.partition("=")
        if not (equals and name and ref):
            raise UserError(f"--models {text}: write it as NAME=REF, with NAME as in the file")
        found = session.load(ref, name=name)
        if not isinstance(found, Model):
            raise UserError(f"--models {text}: is a {found.kind}, not a model")
        given[name] = found
    return given


def _print_plan(plan: MergePlan, json: bool) -> None:
    """Print what a merge would read and write."""
    from llmworks.merge.plan.plan import format_layer_ranges

    read_bytes, written = plan.count_bytes()
    if json:
        print_json(
            {
                "tensors": len(plan.jobs),
                "read_bytes": read_bytes,
                "written_bytes": written,
                "seconds": round(plan.estimate_seconds(), 1),
                "unused": list(plan.unused_parameters),
            }
        )
        return
    names = list(dict.fromkeys(name for job in plan.jobs for name, _ in job.sources))
    print_line(f"{plan.method.name} of {', '.join(names)}\n")
    print_table(
        ("stack", "layers", "first source of each layer"),
        [(stack, len(origins), ", ".join(format_layer_ranges(origins))) for stack, origins in plan.layers.items()],
    )
    print_line(
        f"\n{len(plan.jobs)} tensors; {read_bytes / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write; about"
        f" {max(1, round(plan.estimate_seconds())):,} s on one core, plus disk time."
        + (
            f"\nThe method ignores the file's parameter {', '.join(plan.unused_parameters)}."
            if plan.unused_parameters
            else ""
        )
    )


def _print_methods() -> None:
    """Print all methods with their parameters (per tensor or per model) and defaults."""
    from llmworks.merge.plan.catalogue import METHODS
    from llmworks.merge.plan.parameters import REQUIRED, Parameter

    def describe(one: Parameter) -> str:
        default = "none" if one.default is None else str(one.default).lower()
        of = "" if one.of == "tensor" else ", of each model"
        return f"{one.name} ({'required' if one.default is REQUIRED else default}{of})"

    print_table(
        ("merge_method", "base_model", "parameters (default)"),
        [
            (
                name,
                {"required": "required", "optional": "optional", "none": "any model"}[how.base],
                ", ".join(map(describe, how.parameters)) or "none",
            )
            for name, how in METHODS.items()
        ],
    )
