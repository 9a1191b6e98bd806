"""`llmworks verify`: check files, reproduce exact steps, replay golden tokens."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session
from llmworks.core.errors import GateFailed, UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks verify`."""
    parser = new_parser(
        "verify",
        "Check the files of an artifact and its ancestors, and reproduce exact steps; or replay golden tokens.",
    )
    parser.add_argument("artifact")
    parser.add_argument(
        "engine", nargs="?", help="with --golden: a GGUF file, a server or another model that must agree with the first"
    )
    parser.add_argument(
        "--golden", action="store_true", help="replay the model's golden tokens instead, on itself or on another engine"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        help=(
            "with --golden: maximum mean logit difference in nats (default: by the type of a GGUF file, 0.3 if"
            " unknown; by the bits of a quantized model; else 0.05)"
        ),
    )
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks verify ARTIFACT`."""
    from llmworks.lineage.verify import verify as check
    from llmworks.runtime.execute import compute_recorded_key
    from llmworks.workflows.family import build_workspace_family, reproduce

    if args.golden:
        verify_golden(args)
        return
    if args.engine:
        raise UserError(f"unexpected argument {args.engine!r}; an engine needs --golden")
    session = create_session(args)
    chosen = session.load(args.artifact)
    family = build_workspace_family(session.workspace, chosen)
    findings = check(
        family,
        chosen.digest,
        partial(reproduce, session, family),
        compute_recorded_key,
        session.workspace.list_witnesses,
    )
    if args.json:
        print_json(
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
            print_line(
                f"{'✓' if f.ok else '✗'} {f.node.label.ljust(width)}  {f.node.kind:<8} {f.node.digest[:12]} "
                f" {f.verdict}{f': {f.detail}' if f.detail else ''}"
            )
    wrong = [f for f in findings if not f.ok]
    if wrong:
        raise GateFailed(
            f"{len(wrong)} of {len(findings)} artifacts failed verification; the first is {wrong[0].node.label}:"
            f" {wrong[0].detail}"
        )


def verify_golden(args: argparse.Namespace) -> None:
    """`llmworks verify --golden MODEL [ENGINE]`."""
    from llmworks.core.artifact import Adapter, Model
    from llmworks.generate.replay import replay
    from llmworks.model.golden import record_golden

    session = create_session(args)
    model = session.load(args.artifact)
    other = session.load(args.engine) if args.engine else model
    for artifact in (model, other):
        if not isinstance(artifact, (Model, Adapter)):
            raise UserError(f"{artifact.name}: is a {artifact.kind}; only models and adapters have golden tokens")
    recorded = model.golden
    if recorded is None:
        if other is model or not isinstance(model, Model) or model.format != "hf":
            raise UserError(
                f"{model.name}: no golden tokens recorded; put the model it should agree with first: llmworks"
                f" verify --golden MODEL {args.artifact}"
            )
        recorded = record_golden(model.path)
    bound = args.tolerance if args.tolerance is not None else _get_tolerance(other)
    engine = session.open_engine(other)
    reference = (
        session.open_engine(model)
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
        print_json([{"what": c.name, "ok": c.passed, "detail": c.detail} for c in checks])
    else:
        for c in checks:
            print_line(f"{ {True: '✓', False: '✗', None: '·'}[c.passed] } {c.name:<15} {c.detail}")
    if wrong := [c for c in checks if c.passed is False]:
        raise GateFailed(
            f"{other.name} does not replay the golden tokens of {model.name}: {wrong[0].name}: {wrong[0].detail}"
        )


def _get_tolerance(other: Any) -> float:
    """Return the allowed mean logit difference by the type of quantization; 0.3 for an unknown GGUF type."""
    from llmworks.model.from_gguf import read_quantization_type
    from llmworks.quantize.config import max_gap_for_bits
    from llmworks.quantize.llamacpp.config import max_gap_for_type

    gguf = getattr(other, "format", "") == "gguf"
    kind = other.about.get("type") or (read_quantization_type(other.gguf_path) if gguf else "")
    if kind:
        return max_gap_for_type(str(kind))
    if other.about.get("bits"):
        return max_gap_for_bits(
            int(other.about["bits"]),
            quantized_activations=other.about.get("method") in ("smoothquant", "int8", "zeroquant"),
        )
    return 0.3 if gguf else 0.05
