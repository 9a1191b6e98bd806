"""What `tune sweep` does with its arguments. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import sys

from llmworks.commands.making import pool_of
from llmworks.commands.output import as_json, out, short, workspace_of


def sweep(args: argparse.Namespace) -> None:
    """`llmworks tune sweep RECIPE SEARCH`."""
    from llmworks.sweeping import sweep as run
    from llmworks.tune.search import load_search

    search = load_search(args.search)
    if args.trials is not None:
        search = type(search).model_validate(search.model_dump() | {"trials": args.trials})
    workspace = workspace_of(args)
    found = run(args.recipe, search, workspace, args.set, pool_of(args), lambda line: print(line, file=sys.stderr, flush=True))
    data = found.read()
    if args.json:
        as_json({"report": str(found.path), "best": data["best"], **data["metrics"]})
        return
    sets = " ".join(f"--set {field}={value}" for field, value in data["best"].items())
    out(f"\nBest: {search.metric} {data['metrics']['score']:.4g}\n  llmworks run {args.recipe} {sets}\nReport: {short(found.path / 'report.html')}")
