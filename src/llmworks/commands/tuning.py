"""What `tune sweep` and `tune frontier` do with their arguments. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import sys

from llmworks.commands.making import pool_of
from llmworks.commands.output import as_json, out, short, workspace_of


def sweep(args: argparse.Namespace) -> None:
    """`llmworks tune sweep RECIPE SEARCH`."""
    from llmworks.tune.search.search_space import load_search
    from llmworks.workflows.sweep import sweep as run

    search = load_search(args.search)
    if args.trials is not None:
        search = type(search).model_validate(search.model_dump() | {"trials": args.trials})
    workspace = workspace_of(args)
    found = run(
        args.recipe, search, workspace, args.set, pool_of(args), lambda line: print(line, file=sys.stderr, flush=True)
    )
    data = found.read()
    if args.json:
        as_json({"report": str(found.path), "best": data["best"], **data["metrics"]})
        return
    sets = " ".join(f"--set {field}={value}" for field, value in data["best"].items())
    out(
        f"\nBest: {search.metric} {data['metrics']['score']:.4g}\n  llmworks run {args.recipe} {sets}\nReport:"
        f" {short(found.path / 'report.html')}"
    )


def frontier(args: argparse.Namespace) -> None:
    """`llmworks tune frontier MODEL --data REF`, and `autogguf`."""
    from llmworks.core.artifact import Dataset, Model
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import items_of
    from llmworks.runtime.references import resolve
    from llmworks.workflows.autoquant import Frontier, ways_of
    from llmworks.workflows.autoquant import frontier as run

    for name in (args.out, args.pick):
        if name is not None:
            check_out(name)
    workspace, ways = workspace_of(args), ways_of([name for name in args.ways.split(",") if name])
    strange = next((name for name in ways if not name.startswith(args.only)), None)
    if strange is not None:
        raise UserError(f"autogguf tries GGUF files only, not {strange}; take tune frontier")
    model, data = resolve(args.model, workspace=workspace), resolve(args.data, workspace=workspace)
    if not isinstance(model, Model):
        raise UserError(f"{args.model}: is a {model.kind}, not a model")
    if not isinstance(data, Dataset):
        raise UserError(f"{args.data}: is a {data.kind}; --data wants conversations or texts of what the model is for")
    if args.texts < 1 or args.held < 1:
        raise UserError("--texts and --held must be above 0")
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit must be above 0")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        raise UserError(f"--budget {args.budget:g}: must be a number of megabytes above 0")
    items = items_of(args.suite, args.limit) if args.suite else ()
    job = Frontier(
        model,
        data,
        workspace,
        items,
        args.texts,
        args.held,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        quiet=args.quiet,
    )
    page, chosen = run(job, ways, None if args.budget is None else args.budget * 1e6)
    for name, artifact in ((args.out, page), (args.pick, chosen)):
        if name is not None and artifact is not None:
            workspace.link_out(name, artifact)
    told = page.read()
    if args.json:
        as_json(
            {
                "report": str(page.path),
                "recommended": told["recommended"]["name"],
                "model": str(chosen.path) if chosen else None,
                **told["metrics"],
            }
        )
        return
    best = told["recommended"]
    out(
        f"\n{best['name']}: {best['bytes'] / 1e6:,.1f} MB, {best['kl']:.4f} nats a token away"
        + (f"\nModel: {short(args.pick if args.pick is not None else chosen.path)}" if chosen else "")
        + f"\nReport: {short(page.path / 'report.html')}"
    )


def evolve(args: argparse.Namespace) -> None:
    """`llmworks tune evolve FILE --suite NAMES`."""
    from llmworks.core.errors import UserError
    from llmworks.core.workspace import check_out
    from llmworks.evaluate.suites import items_of
    from llmworks.merge.plan.config import MergeConfig
    from llmworks.workflows.evolve import Evolution, evolution
    from llmworks.workflows.merge_file import found_models, read

    for name in (args.out, args.pick):
        if name is not None:
            check_out(name)
    documents, workspace = read(args.file, args.set), workspace_of(args)
    config = documents[0].config
    if len(documents) > 1 or not isinstance(config, MergeConfig):
        raise UserError(
            f"{args.file}: one merge is evolved, this holds {'several' if len(documents) > 1 else 'experts'}"
        )
    models = found_models(config, {}, workspace)
    held = items_of(args.held, args.limit) if args.held else ()
    job = Evolution(
        args.file.stem,
        config,
        models,
        workspace,
        items_of(args.suite, args.limit),
        held,
        args.attempts,
        args.population,
        args.gradient,
        args.negative,
        args.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        quiet=args.quiet,
    )
    page, child = evolution(job)
    for name, artifact in ((args.out, page), (args.pick, child)):
        if name is not None:
            workspace.link_out(name, artifact)
    told = page.read()
    if args.json:
        as_json({"report": str(page.path), "model": str(child.path), "best": told["best"], "scores": told["scores"]})
        return
    out(
        f"\nBest: {told['best']['score']:.4g} "
        f" {'  '.join(f'{name} {value:g}' for name, value in told['best']['values'].items())}\nModel:"
        f" {short(args.pick if args.pick is not None else child.path)}\nReport: {short(page.path / 'report.html')}"
    )
