"""`llmworks show`: show an artifact's origin and metrics."""

from __future__ import annotations

import argparse

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session


def build_parser() -> Parser:
    """Return the parser of `llmworks show`."""
    parser = new_parser("show", "Show an artifact's origin, config, metrics and files.")
    parser.add_argument("artifact")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks show ARTIFACT`."""

    artifact = create_session(args).load(args.artifact)
    m = artifact.manifest
    assert m is not None
    if args.json:
        print_json(m.model_dump(mode="json"))
        return
    print_line(f"{artifact.name}: {m.kind} {m.digest[:12]}")
    print_line(f"  at        {artifact.path}")
    made = f"{m.stage} (revision {m.revision}, {m.derivation})" if m.stage else ""
    print_line(f"  made by   {made or f'external: {artifact.ref or artifact.path}'}")
    if m.started:
        print_line(
            f"  when      {m.started} to {m.finished[:19]}, seed {m.seed}, {m.threads} threads on"
            f" {m.platform.get('processor', '?')}"
        )
        print_line(f"  with      {', '.join(f'{k} {v}' for k, v in m.versions.items())}")
    for parent in m.parents:
        print_line(
            f"  from      {parent.role}: {parent.name} ({parent.kind}"
            f" {parent.digest[:12]}{f', {parent.ref}' if parent.ref else ''})"
        )
    for section, values in (("config", m.config), ("about", m.about), ("metrics", m.metrics)):
        for key, value in values.items():
            if value not in ({}, ""):
                print_line(f"  {section:<9} {key} = {round(value, 5) if isinstance(value, float) else value}")
    for name, entry in m.files.items():
        print_line(f"  file      {name}  {entry.bytes:,} bytes  {entry.sha256[:12]}")
    if m.golden:
        print_line(
            f"  golden    {len(m.golden.conversations)} conversations,"
            f" {sum(len(c.positions) for c in m.golden.conversations)} positions, stop ids {m.golden.stop_ids}"
        )
