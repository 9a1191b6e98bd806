"""What each command prints. One function per command; all logic is in the rooms below."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llmworks.errors import GateFailed, UserError
from llmworks.workspace import Workspace, check_out, default_workspace


def out(text: str = "") -> None:
    """Print a line of result."""
    print(text)


def as_json(value: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def workspace_of(args: argparse.Namespace) -> Workspace:
    """The workspace that the command works in."""
    return Workspace(args.workspace or default_workspace())


def run(args: argparse.Namespace) -> None:
    """`llmworks run RECIPE`."""
    from llmworks.recipe import load_recipe
    from llmworks.runner import Run

    recipe = load_recipe(args.recipe, args.set)
    workspace = workspace_of(args)
    target = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=target, flush=True)

    say(f"{recipe.name}: {len(recipe.steps)} steps in {_short(workspace.root)}")
    job = Run(recipe, workspace, say=say, quiet=args.quiet)
    done = job.run(explain=args.explain)
    made = sum(j.state == "made" for j in done)
    if args.json:
        as_json(
            [
                {
                    "step": j.name,
                    "state": j.state,
                    "why": j.why,
                    "digest": j.artifact.digest if j.artifact else None,
                    "path": str(j.artifact.path) if j.artifact else None,
                }
                for j in done
            ]
        )
        return
    out(f"\n{made} steps made, {sum(j.state == 'up to date' for j in done)} up to date." if made else "\nEverything is up to date.")
    if page := job.report_path():
        out(f"Report: {_short(page)}")
    if recipe.next:
        out("Next:")
        for line in recipe.next:
            out(f"  {line.replace('{workspace}', str(_short(workspace.root)))}")


def plan(args: argparse.Namespace) -> None:
    """`llmworks plan RECIPE`."""
    from llmworks.recipe import load_recipe
    from llmworks.runner import Run

    recipe = load_recipe(args.recipe, args.set)
    judgements = Run(recipe, workspace_of(args)).plan()
    if args.json:
        as_json(
            [{"step": j.name, "state": j.state, "why": j.why, "expect": j.expect.model_dump() if j.expect else None} for j in judgements]
        )
        return
    pending = [j for j in judgements if j.state in ("to run", "waits")]
    rows = []
    for j in judgements:
        e = j.expect if j.state in ("to run", "waits") else None
        rows.append(
            (
                j.name,
                j.state,
                _amount(e.seconds if e else 0, "s"),
                _amount(e.memory_mb if e else 0, "MB"),
                _amount(e.disk_mb if e else 0, "MB"),
                j.why,
            )
        )
    table(("step", "state", "time", "memory", "disk", "why"), rows)
    expected = [j.expect for j in pending if j.expect]
    out(
        f"\n{len(pending)} steps to run: about {sum(e.seconds for e in expected) / 60:.1f} minutes, {max((e.memory_mb for e in expected), default=0) / 1e3:.1f} GB of memory, {sum(e.disk_mb for e in expected) / 1e3:.2f} GB of disk."
    )
    sources = sorted({j.expect_from for j in pending if j.expect_from})
    unknown = [j.name for j in pending if j.expect is None or not any((j.expect.seconds, j.expect.disk_mb))]
    if sources:
        out(f"Figures: {', '.join(sources)}." + (f" Nothing is known of {', '.join(unknown)}." if unknown else ""))


def stages(args: argparse.Namespace) -> None:
    """`llmworks stages [NAME] [--schema]`."""
    from llmworks.stages import config_help, resolve
    from llmworks.stages import table as stage_table

    if args.schema:
        from llmworks.recipe_schema import recipe_schema

        as_json(recipe_schema())
        return
    if args.name:
        stage = resolve(args.name)
        out(f"{stage.name}  revision {stage.stage.revision}, {stage.stage.derivation}, makes a {stage.output.kind}\n\n{stage.help}\n")
        table(("input", "takes"), [(i.name, i.describe()) for i in stage.inputs.values()])
        out()
        table(("config", "type", "what"), config_help(stage.config))
        return
    if args.json:
        as_json({name: {"summary": s.summary, "revision": s.revision, "derivation": s.derivation} for name, s in stage_table().items()})
        return
    table(
        ("stage", "revision", "derivation", "what"),
        [(name, s.revision, s.derivation, s.summary) for name, s in sorted(stage_table().items())],
    )


def show(args: argparse.Namespace) -> None:
    """`llmworks show ARTIFACT`."""
    from llmworks.references import resolve

    artifact = resolve(args.artifact, workspace=workspace_of(args))
    m = artifact.manifest
    assert m is not None
    if args.json:
        as_json(m.model_dump(mode="json"))
        return
    out(f"{artifact.name}: {m.kind} {m.digest[:12]}")
    out(f"  at        {artifact.path}")
    out(
        f"  made by   {f'{m.stage} (revision {m.revision}, {m.derivation})' if m.stage else f'from outside: {artifact.ref or artifact.path}'}"
    )
    if m.started:
        out(f"  when      {m.started} to {m.finished[:19]}, seed {m.seed}, {m.threads} threads on {m.platform.get('processor', '?')}")
        out(f"  with      {', '.join(f'{k} {v}' for k, v in m.versions.items())}")
    for parent in m.parents:
        out(f"  from      {parent.role}: {parent.name} ({parent.kind} {parent.digest[:12]}{f', {parent.ref}' if parent.ref else ''})")
    for section, values in (("config", m.config), ("about", m.about), ("metrics", m.metrics)):
        for key, value in values.items():
            if value not in ({}, ""):
                out(f"  {section:<9} {key} = {round(value, 5) if isinstance(value, float) else value}")
    for name, entry in m.files.items():
        out(f"  file      {name}  {entry.bytes:,} bytes  {entry.sha256[:12]}")
    if m.golden:
        out(
            f"  golden    {len(m.golden.conversations)} conversations, {sum(len(c.positions) for c in m.golden.conversations)} positions, stop ids {m.golden.stop_ids}"
        )


def tree(args: argparse.Namespace) -> None:
    """`llmworks tree [ARTIFACT]`."""
    from llmworks.lineage.draw import draw_svg, draw_text
    from llmworks.references import resolve
    from llmworks.relatives import family_with

    workspace = workspace_of(args)
    family = family_with(workspace)
    if args.artifact:
        chosen = resolve(args.artifact, workspace=workspace)
        if chosen.digest not in family.nodes:
            family = family_with(workspace, chosen)
        family = family.restricted([chosen.digest])
    if not family.nodes:
        raise UserError(f"{workspace.root}: no artifacts here yet; run a recipe first (llmworks run recipes/quickstart.yaml)")
    if args.json:
        as_json(
            [
                {
                    "digest": n.digest,
                    "kind": n.kind,
                    "name": n.label,
                    "stage": n.stage,
                    "parents": [{"role": r, "digest": d} for r, d in n.parents],
                }
                for n in family.nodes.values()
            ]
        )
        return
    if args.svg:
        Path(args.svg).write_text(draw_svg(family), encoding="utf-8")
    if args.html:
        from llmworks.report import ReportBuilder

        page = ReportBuilder(
            title="Family tree", lead=f"{len(family.nodes)} artifacts. Dashed edges are declared, solid ones can be derived again."
        )
        page.drawing("Who came from whom", draw_svg(family))
        Path(args.html).write_text(page.html(), encoding="utf-8")
    out(draw_text(family))


def verify(args: argparse.Namespace) -> None:
    """`llmworks verify ARTIFACT`."""
    from llmworks.lineage.verify import verify as check
    from llmworks.references import resolve
    from llmworks.relatives import derive, family_with

    workspace = workspace_of(args)
    chosen = resolve(args.artifact, workspace=workspace)
    family = family_with(workspace, chosen)
    findings = check(family, chosen.digest, partial(derive, workspace, family))
    if args.json:
        as_json(
            [
                {"name": f.node.label, "kind": f.node.kind, "digest": f.node.digest, "verdict": f.verdict, "detail": f.detail}
                for f in findings
            ]
        )
    else:
        width = max(len(f.node.label) for f in findings)
        for f in findings:
            out(
                f"{'✓' if f.ok else '✗'} {f.node.label.ljust(width)}  {f.node.kind:<8} {f.node.digest[:12]}  {f.verdict}{f': {f.detail}' if f.detail else ''}"
            )
    wrong = [f for f in findings if not f.ok]
    if wrong:
        raise GateFailed(f"{len(wrong)} of {len(findings)} artifacts do not verify; the first is {wrong[0].node.label}: {wrong[0].detail}")


def diff(args: argparse.Namespace) -> None:
    """`llmworks diff A B`."""
    from llmworks.lineage.diff import diff as compare
    from llmworks.references import resolve

    workspace = workspace_of(args)
    a, b = resolve(args.a, workspace=workspace), resolve(args.b, workspace=workspace)
    rows = compare(a, b)
    if args.json:
        as_json([{"section": s, "field": f, "a": x, "b": y} for s, f, x, y in rows])
    elif not rows:
        out(f"{a.name} and {b.name} are the same")
    else:
        table(("", "field", a.name, b.name), [(s, f, _brief(x), _brief(y)) for s, f, x, y in rows])


def gc(args: argparse.Namespace) -> None:
    """`llmworks gc`."""
    workspace = workspace_of(args)
    if not workspace.store.is_dir():
        raise UserError(f"{workspace.root}: no workspace there; name one with --workspace")
    removed = workspace.collect(scratch=args.scratch, dry_run=args.dry_run)
    if args.json:
        as_json([{"path": str(p), "bytes": n} for p, n in removed])
        return
    for path, size in removed:
        out(f"{'would remove' if args.dry_run else 'removed'}  {_short(path)}  {size / 1e6:.1f} MB")
    out(f"{len(removed)} items, {sum(n for _, n in removed) / 1e6:.1f} MB")


def assets_list(args: argparse.Namespace) -> None:
    """`llmworks assets list`."""
    from llmworks import assets

    if args.json:
        as_json(
            {
                a.name: {
                    "kind": a.kind,
                    "what": a.what,
                    "licence": a.licence,
                    "bytes": a.bytes,
                    "cached": assets.is_cached(a),
                    "source": [w.requirement for w in a.wheels],
                    "sha256": [w.sha256 for w in a.wheels],
                }
                for a in assets.CATALOGUE.values()
            }
        )
        return
    table(
        ("asset", "kind", "MB", "licence", "here", "source", "what"),
        [
            (
                a.name,
                a.kind,
                f"{a.bytes / 1e6:.0f}",
                a.licence,
                "yes" if assets.is_cached(a) else "no",
                ", ".join(w.requirement for w in a.wheels),
                a.what,
            )
            for a in assets.CATALOGUE.values()
        ],
    )


def assets_fetch(args: argparse.Namespace) -> None:
    """`llmworks assets fetch NAME`."""
    from llmworks import assets

    for name in args.names:
        out(f"{name}  {assets.fetch(name)}")


def assets_path(args: argparse.Namespace) -> None:
    """`llmworks assets path NAME`."""
    from llmworks import assets

    asset = assets.get(args.name)
    if not assets.is_cached(asset):
        raise UserError(f"{args.name} is not in the cache; fetch it with: llmworks assets fetch {args.name}")
    out(str(assets.directory(asset)))


def chat(args: argparse.Namespace) -> None:
    """`llmworks chat MODEL`."""
    from llmworks.generate.chat import Conversation, converse
    from llmworks.references import open_engine, resolve
    from llmworks.types import Sampling

    workspace = workspace_of(args)
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    tools = _read_tools(args.tools) if args.tools else ()
    artifact = resolve(args.model, workspace=workspace)
    engine = open_engine(artifact, workspace)
    try:
        converse(Conversation(engine, sampling, args.system, tools), args.message)
    finally:
        engine.close()


def _read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON list of functions ({error})") from None
    if not isinstance(value, list) or not all(isinstance(t, dict) and "name" in t.get("function", t) for t in value):
        raise UserError(f"{path}: must be a JSON list of functions, each with a name and parameters")
    return tuple(value)


def serve(args: argparse.Namespace) -> None:
    """`llmworks serve MODEL`."""
    from llmworks.references import open_engine, resolve
    from llmworks.serve.server import check_port, serve_forever

    check_port(args.host, args.port)
    workspace = workspace_of(args)
    artifact = resolve(args.model, workspace=workspace)
    engine = open_engine(artifact, workspace)
    try:
        serve_forever(engine, args.name or artifact.name, args.host, args.port)
    finally:
        engine.close()


def stage(args: argparse.Namespace) -> None:
    """`llmworks GROUP STAGE --INPUT REF ... --out DIR`: one stage, outside a recipe."""
    import yaml
    from pydantic import ValidationError

    from llmworks.execute import execute, missing_inputs
    from llmworks.recipe import assign, config_problem
    from llmworks.references import open_engine, resolve
    from llmworks.runner import facts

    stage, workspace = args.stage, workspace_of(args)
    values: dict[str, Any] = {}
    if args.config:
        try:
            values = yaml.safe_load(args.config.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{args.config}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{args.config}: must be a mapping of config fields")
    for override in args.set:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value")
        assign(values, name.split("."), text)
    try:
        config = stage.config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(config_problem(stage.config, dict(e), f"{stage.name}.config") for e in error.errors())) from None
    given: dict[str, Any] = {}
    for name, wanted in stage.inputs.items():
        refs = getattr(args, f"input_{name}")
        if not refs:
            continue
        found = [resolve(ref.partition("=")[2] if wanted.shape == "dict" else ref, workspace=workspace) for ref in refs]
        for artifact in found:
            if not isinstance(artifact, wanted.kinds):
                raise UserError(f"--{name}: {artifact.name} is a {artifact.kind}, wanted is {wanted.describe()}")
        given[name] = (
            found[0]
            if wanted.shape == "one"
            else found
            if wanted.shape == "list"
            else {ref.partition("=")[0]: a for ref, a in zip(refs, found, strict=True)}
        )
    missing = missing_inputs(stage, given)
    if missing:
        raise UserError(f"--{missing[0]} ({stage.inputs[missing[0]].describe()}) is missing")
    check_out(args.out)
    outcome = execute(
        stage, config, given, workspace, seed=args.seed, open_engine=partial(open_engine, workspace=workspace), quiet=args.quiet
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
    out(
        f"✓ {stage.name}  {outcome.artifact.kind} {outcome.artifact.digest[:12]}  {'up to date' if not outcome.made else f'{outcome.seconds:.1f} s'}  {facts(outcome.artifact.metrics)}"
    )
    out(f"Result: {args.out}\nNext:\n  llmworks show {args.out}\n  llmworks tree {args.out}")


def table(columns: tuple[str, ...], rows: list[Any]) -> None:
    """Print a plain table; the last column takes what is left of the terminal's width."""
    from rich.console import Console
    from rich.table import Table

    view = Table(box=None, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        view.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        view.add_row(*(str(v).replace("[", "\\[") for v in row))
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160, highlight=False).print(view)


def _short(path: Path) -> Path:
    """A path as people would write it from here."""
    return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path


def _brief(value: Any) -> str:
    text = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 70 else text[:69] + "…"


def _amount(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if value else ""
