"""Translate an Axolotl or LLaMA-Factory YAML file to a recipe with notes on every key that has no exact equivalent."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmworks.core.errors import UserError
from llmworks.core.text.yaml import load_yaml
from llmworks.importers import axolotl, llamafactory
from llmworks.importers.keys import HEADINGS, KeyNote

TOOLS = {"base_model": axolotl, "model_name_or_path": llamafactory}


@dataclass(frozen=True)
class TranslatedRecipe:
    """A translated recipe, and notes on the keys without an exact equivalent."""

    tool: str
    text: str
    notes: tuple[KeyNote, ...]


def translate(file: Path) -> TranslatedRecipe:
    """Translate a configuration file to a recipe.

    UserError in one line for a file that is not such a configuration, or cannot be translated.
    """
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise UserError(f"{file}: is a directory") from None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())[:120]})") from None
    module = next((module for key, module in TOOLS.items() if isinstance(values, dict) and key in values), None)
    if module is None:
        raise UserError(f"{file}: not a configuration of Axolotl (base_model) or LLaMA-Factory (model_name_or_path)")
    try:
        steps, seed, keys = module.translate(values, file.parent)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    keys.note_remaining()
    return TranslatedRecipe(module.TOOL, _render_recipe(file, module.TOOL, steps, seed, keys.notes), tuple(keys.notes))


def _render_recipe(file: Path, tool: str, steps: dict[str, Any], seed: int, notes: list[KeyNote]) -> str:
    """Render the recipe with its header of notes."""
    lines = [
        f"{file.name}, translated from {tool}. Review it, then: llmworks plan, llmworks train selftest, llmworks run."
    ]
    for fate, heading in HEADINGS.items():
        found = [note for note in notes if note.fate == fate]
        if found:
            lines += ["", f"{heading}:"]
            for text in dict.fromkeys(note.text for note in found):
                names = ", ".join(note.key for note in found if note.text == text)
                lines += textwrap.wrap(
                    f"{names}: {text}",
                    150,
                    initial_indent="  ",
                    subsequent_indent="    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in file.stem) or "translated"
    body = yaml.safe_dump({"name": name, "seed": seed, "steps": steps}, sort_keys=False, allow_unicode=True, width=150)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + body
