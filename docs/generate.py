"""Write what docs show of the code: docs/stages.md, the README's commands, CONTRIBUTING's rows. Run `make docs`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llmworks.commands.table import COMMANDS, STAGE_USAGE
from llmworks.core.artifact import Config
from llmworks.runtime.config_help import config_help
from llmworks.runtime.resolve import resolve
from llmworks.runtime.stages import STAGES

ROOT = Path(__file__).parents[1]


def fields(config: type[Config]) -> list[str]:
    """Table rows of a config's fields, nested configs spelled out."""
    return [f"| `{name}` | {kind.replace('|', 'or')} | {what} |" for name, kind, what in config_help(config)]


def stages_page() -> str:
    """The page of all stages that are run by hand."""
    parts = [
        "# Stages\n\nMade by `make docs` from the code. A stage is a function; a recipe step names it, or the command"
        " line runs it alone.\n"
    ]
    for name in sorted(name for name, stage in STAGES.items() if not stage.internal):
        stage = resolve(name)
        inputs = "\n".join(f"- `{i.name}`: {i.describe()}" for i in stage.inputs.values())
        rows = fields(stage.config)
        table = "| config | type | what |\n|---|---|---|\n" + "\n".join(rows) if rows else "No config fields."
        flags = " ".join(
            f"--{i.name.replace('_', '-')} {'KEY=REF' if i.shape == 'dict' else 'REF'}"
            for i in stage.inputs.values()
            if i.required
        )
        words = f"{name} {COMMANDS[name].arguments}" if name in COMMANDS else f"{name.replace('.', ' ')} {flags}"
        article = "an" if stage.output.kind[0] in "aeiou" else "a"
        parts.append(
            f"## {name}\n\n{stage.help}\n\nMakes {article} {stage.output.kind}. Revision {stage.stage.revision},"
            f" {stage.stage.derivation}.\n\n```\nllmworks {words} --out DIR\n```\n\n{inputs}\n\n{table}\n"
        )
    return "\n".join(parts)


def commands_table() -> str:
    """The README's table of commands."""
    rows = [
        f"| `llmworks {' '.join(f'{name} {command.arguments}'.split())}` | {command.what} |".replace("|path", "\\|path")
        for name, command in COMMANDS.items()
    ]
    rows.append(f"| `llmworks {STAGE_USAGE}` | one stage alone: `data chat`, `train sft`, `quantize gguf` ... |")
    return "\n".join(["| command | what |", "|---|---|", *(row.replace("list|fetch", "list\\|fetch") for row in rows)])


def rows_table() -> str:
    """CONTRIBUTING's table of rows and rooms."""
    spec = importlib.util.spec_from_file_location("rows", ROOT / "tests" / "rows.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [
        f"| {number} | `{room}` | {what} |"
        for number, rooms in enumerate(module.ROWS, 1)
        for room, what in rooms.items()
        if what
    ]
    return "\n".join(["| row | room | what |", "|---|---|---|", *lines])


def with_table(text: str, name: str, table: str) -> str:
    """A page whose table between two marks is replaced."""
    begin, end = f"<!-- {name}: made by make docs -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{table}{end}{after}"


def pages() -> dict[Path, str]:
    """All pages that are made of the code, as they should be."""
    readme, contributing = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
    return {
        ROOT / "docs" / "stages.md": stages_page(),
        readme: with_table(readme.read_text(encoding="utf-8"), "commands", commands_table()),
        contributing: with_table(contributing.read_text(encoding="utf-8"), "rows", rows_table()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
