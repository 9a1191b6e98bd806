"""`llmworks import`: convert another tool's configuration to a recipe."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.core.errors import RecipeError, UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks import`."""
    parser = new_parser(
        "import",
        "Convert an Axolotl or LLaMA-Factory configuration to a recipe, and report how each key was translated.",
        workspace=False,
    )
    parser.add_argument("file", type=Path, help="YAML file of the configuration")
    parser.add_argument("--out", type=Path, help="recipe file to write; default: standard output")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks import FILE`."""
    from llmworks.importers.keys import HEADINGS
    from llmworks.importers.translate import translate as translated
    from llmworks.runtime.read_recipe import load_recipe

    if args.out is not None and args.out.exists():
        raise UserError(f"{args.out}: already exists; choose another --out")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent}: no such directory")
    found = translated(args.file)
    with tempfile.TemporaryDirectory(dir=None if args.out is None else args.out.parent) as folder:
        draft = Path(folder) / "recipe.yaml"
        draft.write_text(found.text, encoding="utf-8")
        missing: list[str] = []
        try:
            load_recipe(draft)
        except RecipeError as error:
            problems = [line.removeprefix(f"{draft}:") for line in error.problems]
            missing = [line.partition(": ")[2] for line in problems if ".use: " in line]  # may exist on another machine
            if len(missing) < len(problems):
                raise UserError(
                    f"{args.file}: does not give a valid recipe: {'; '.join(f'line {line}' for line in problems)}"
                ) from None
        if args.out is not None:
            draft.replace(args.out)
    if args.json:
        print_json(
            {
                "tool": found.tool,
                "recipe": found.text,
                "keys": [{"key": note.key, "fate": note.fate, "why": note.text} for note in found.notes],
            }
        )
        return
    if args.out is None:
        print_line(found.text.rstrip())
    for line in missing:
        print(f"not found: {line}", file=sys.stderr)
    for fate in ("lost", "unknown"):
        for note in found.notes:
            if note.fate == fate:
                print(f"{HEADINGS[note.fate].partition(':')[0].lower()}: {note.key}: {note.text}", file=sys.stderr)
    if args.out is not None:
        print_line(
            f"{args.out}: recipe converted from {found.tool}'s {args.file.name}; its header lists the translation"
            f" of {len(found.notes)} keys\n  llmworks plan {args.out}\n  llmworks run {args.out}"
        )
