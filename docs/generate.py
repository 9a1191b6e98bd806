"""Write docs/stages.md from the stage table and the configs: run `make docs` after changing a stage."""

from __future__ import annotations

from pathlib import Path

from llmworks.core.artifact import Config
from llmworks.runtime.config_help import config_help
from llmworks.runtime.resolve import resolve
from llmworks.runtime.stages import STAGES

COMMANDS = {"merge": "merge FILE"}  # stages that a command of their own is for


def rows(config: type[Config]) -> list[str]:
    """Table rows of a config's fields, nested configs spelled out."""
    return [f"| `{name}` | {kind.replace('|', 'or')} | {what} |" for name, kind, what in config_help(config)]


def stages_page() -> str:
    """The page of all stages."""
    parts = [
        "# Stages\n\nMade by `make docs` from the code. A stage is a function; a recipe step names it, or the command"
        " line runs it alone.\n"
    ]
    for name in sorted(STAGES):
        stage = resolve(name)
        inputs = "\n".join(f"- `{i.name}`: {i.describe()}" for i in stage.inputs.values())
        fields = rows(stage.config)
        table = "| config | type | what |\n|---|---|---|\n" + "\n".join(fields) if fields else "No config fields."
        flags = " ".join(
            f"--{i.name.replace('_', '-')} {'KEY=REF' if i.shape == 'dict' else 'REF'}"
            for i in stage.inputs.values()
            if i.required
        )
        parts.append(
            f"## {name}\n\n{stage.help}\n\nMakes {'an' if stage.output.kind[0] in 'aeiou' else 'a'}"
            f" {stage.output.kind}. Revision {stage.stage.revision}, {stage.stage.derivation}.\n\n```\nllmworks"
            f" {COMMANDS.get(name, f'{name.replace(chr(46), chr(32))} {flags}')} --out"
            f" DIR\n```\n\n{inputs}\n\n{table}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "stages.md").write_text(stages_page(), encoding="utf-8")
