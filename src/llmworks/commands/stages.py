"""`llmworks stages`: list the stages, or describe one with its inputs and fields."""

from __future__ import annotations

import argparse

from llmworks.commands.output import print_json, print_line, print_table
from llmworks.commands.parsers import Parser, new_parser


def build_parser() -> Parser:
    """Return the parser of `llmworks stages`."""
    parser = new_parser("stages", "List the stages, or describe one with its inputs and fields.", workspace=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of recipes, for editors")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks stages [NAME] [--schema]`."""
    from llmworks.runtime.config.help import config_help
    from llmworks.runtime.resolve import resolve_stage
    from llmworks.runtime.stages import get_stages as stage_table

    if args.schema:
        from llmworks.runtime.recipe_schema import build_recipe_schema

        print_json(build_recipe_schema())
        return
    if args.name:
        stage = resolve_stage(args.name)
        if args.json:
            fields = config_help(stage.config)
            print_json(
                {
                    "name": stage.name,
                    "summary": stage.stage.summary,
                    "help": stage.help,
                    "revision": stage.stage.revision,
                    "derivation": stage.stage.derivation,
                    "output": stage.output.kind,
                    "inputs": {one.name: one.describe() for one in stage.inputs.values()},
                    "fields": [{"name": name, "type": kind, "description": text} for name, kind, text in fields],
                }
            )
            return
        print_line(
            f"{stage.name}  revision {stage.stage.revision}, {stage.stage.derivation}, makes"
            f" {'an' if stage.output.kind[0] in 'aeiou' else 'a'} {stage.output.kind}\n\n{stage.help}\n"
        )
        print_table(("input", "takes"), [(i.name, i.describe()) for i in stage.inputs.values()])
        print_line()
        print_table(("field", "type and default", "description"), config_help(stage.config))
        return
    known = {name: stage for name, stage in stage_table().items() if not stage.internal}
    if args.json:
        print_json(
            {
                name: {"summary": s.summary, "revision": s.revision, "derivation": s.derivation}
                for name, s in known.items()
            }
        )
        return
    print_table(
        ("stage", "revision", "derivation", "summary"),
        [(name, s.revision, s.derivation, s.summary) for name, s in sorted(known.items())],
    )
