"""`llmworks run`: run a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmworks.commands.output import print_json, print_line, relative_path
from llmworks.commands.parsers import Parser, add_workers, new_parser
from llmworks.commands.session import create_pool, get_workspace
from llmworks.core.trackers import check_trackers as check_trackers


def build_parser() -> Parser:
    """Return the parser of `llmworks run`."""
    parser = new_parser("run", "Run a recipe: skip steps that are up to date, resume interrupted ones.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    add_workers(parser)
    parser.add_argument("--explain", action="store_true", help="show why each step runs or is skipped")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks run RECIPE`."""
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import RecipeRun

    recipe = load_recipe(args.recipe, args.set)
    workspace = get_workspace(args)
    target = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=target, flush=True)

    say(f"{recipe.name}: {len(recipe.steps)} steps in {relative_path(workspace.root)}")
    check_trackers(args.track)
    job = RecipeRun(recipe, workspace, say=say, quiet=args.quiet, pool=create_pool(args), track=args.track)
    done = job.run(explain=args.explain)
    made = sum(j.state == "made" for j in done)
    if args.json:
        print_json(
            [
                {
                    "step": j.name,
                    "state": j.state,
                    "why": j.reason,
                    "digest": j.artifact.digest if j.artifact else None,
                    "path": str(j.artifact.path) if j.artifact else None,
                }
                for j in done
            ]
        )
        return
    print_line(
        f"\n{made} steps run, {sum(j.state == 'up to date' for j in done)} up to date."
        if made
        else "\nEverything is up to date."
    )
    if page := job.report_path():
        print_line(f"Report: {relative_path(page)}")
    if recipe.next:
        print_line("Next:")
        for line in recipe.next:
            print_line(f"  {line.replace('{workspace}', str(relative_path(workspace.root)))}")
