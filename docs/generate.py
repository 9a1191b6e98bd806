"""Write what docs show of the code: docs/stages/, docs/names.md, and tables of README, CONTRIBUTING and docs/labs.md.

Run `make docs`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `labs`, which is not installed

from labs.tools.contract import list_terms
from labs.tools.lab import list_labs

from llmworks.commands.table import COMMANDS, STAGE_USAGE, Command
from llmworks.core.artifact import Config
from llmworks.evaluate.protocol.harness import read_fields
from llmworks.runtime.config.help import field_help
from llmworks.runtime.names import names
from llmworks.runtime.resolve import ResolvedStage, resolve_stage
from llmworks.runtime.stages import STAGES

HEADINGS = {"stages": "Stages", "inputs": "Inputs", "flags": "Flags of commands", "metrics": "Metrics"}
MADE = "Made by `make docs` from the code."


def stages() -> list[ResolvedStage]:
    """All stages that are run by hand, by name."""
    return [resolve_stage(name) for name in sorted(name for name, stage in STAGES.items() if not stage.internal)]


def group_of(stage: ResolvedStage) -> str:
    """The page of a stage."""
    return stage.name.partition(".")[0]


def nested(annotation: Any) -> list[type[Config]]:
    """The config classes that a field's type holds."""
    parts = (annotation, *typing.get_args(annotation))
    own = [part for part in parts if isinstance(part, type) and issubclass(part, Config)]
    return own + [kind for part in parts if part is not annotation for kind in nested(part) if kind not in own]


def classes_of(model: type[Config]) -> list[type[Config]]:
    """The config classes whose fields a stage has: its own, those it inherits from, and those of its fields."""
    found = [kind for kind in model.__mro__ if issubclass(kind, Config) and kind is not Config]
    for kind in list(found):
        for name in inspect.get_annotations(kind):
            if name in kind.model_fields:
                found += [
                    one
                    for inner in nested(kind.model_fields[name].annotation)
                    for one in classes_of(inner)
                    if one not in found
                ]
    return list(dict.fromkeys(found))


def shared_classes() -> list[type[Config]]:
    """The config classes with fields that several stages have, and that are not one stage's own."""
    own = {stage.config for stage in stages()}
    uses: dict[type[Config], int] = {}
    for stage in stages():
        for kind in classes_of(stage.config):
            uses[kind] = uses.get(kind, 0) + 1
    return [kind for kind, times in uses.items() if times > 1 and own_fields(kind) and kind not in own]


def own_fields(kind: type[Config]) -> list[str]:
    """The fields that a class declares itself."""
    return [name for name in inspect.get_annotations(kind) if name in kind.model_fields]


def title(kind: type[Config]) -> str:
    """The heading of a class: its name without Config."""
    return kind.__name__.removesuffix("Config") or kind.__name__


def anchor(kind: type[Config]) -> str:
    """The link to the section of a class: of its stage, or of the shared fields."""
    for stage in stages():
        if stage.config is kind:
            return f"[{stage.name}]({group_of(stage)}.md#{stage.name.replace('.', '')})"
    return f"[{title(kind)}](shared.md#{title(kind).lower()})"


def table(kind: type[Config], shared: list[type[Config]], prefix: str = "", rates: Any = None) -> Iterator[str]:
    """Table rows of the fields that a class declares; nested classes that no other stage has are spelled out."""
    for name in own_fields(kind):
        inner = [one for one in nested(kind.model_fields[name].annotation) if own_fields(one)]
        if len(inner) == 1 and inner[0] not in shared and inner[0] is kind.model_fields[name].annotation:
            yield from table(inner[0], shared, f"{prefix}{name}.", rates)
            continue
        what, text = field_help(kind, name)
        links = ", ".join(anchor(one) for one in inner if one in shared)
        yield f"| `{prefix}{name}` | {what.replace('|', 'or')}{f': {links}' if links else ''} | {text} |"


def fields_table(kind: type[Config], shared: list[type[Config]]) -> str:
    """The table of a class's own fields, or ""."""
    rows = list(table(kind, shared))
    return "| config | type | what |\n|---|---|---|\n" + "\n".join(rows) if rows else ""


def stage_section(stage: ResolvedStage, shared: list[type[Config]]) -> str:
    """One stage: what it does, its command, its inputs, its fields."""
    name = stage.name
    inputs = "\n".join(f"- `{i.name}`: {i.describe()}" for i in stage.inputs.values())
    flags = " ".join(
        f"--{i.name.replace('_', '-')} {'KEY=REF' if i.shape == 'dict' else 'REF'}"
        for i in stage.inputs.values()
        if i.required
    )
    words = f"{name} {COMMANDS[name].arguments}" if name in COMMANDS else f"{name.replace('.', ' ')} {flags}"
    article = "an" if stage.output.kind[0] in "aeiou" else "a"
    kinds = [kind for kind in stage.config.__mro__ if issubclass(kind, Config) and kind is not Config]
    linked = [*shared, *(other.config for other in stages() if other.config is not stage.config)]
    head = "| config | type | what |\n|---|---|---|\n"
    rows = [row for kind in kinds if kind not in linked for row in table(kind, linked)]
    own = head + "\n".join(rows) if rows else ""
    others = ", ".join(anchor(kind) for kind in kinds if kind in linked and own_fields(kind))
    more = f"{'And the' if own else 'The'} fields of {others}." if others else ""
    body = "\n\n".join(part for part in (own, more) if part) or "No config fields."
    return (
        f"## {name}\n\n{stage.help}\n\nMakes {article} {stage.output.kind}. Revision {stage.stage.revision},"
        f" {stage.stage.derivation}.\n\n```\nllmworks {words} --out DIR\n```\n\n{inputs}\n\n{body}\n"
    )


def stage_pages() -> dict[str, str]:
    """File name -> page: an index, a page for each group, and one of the fields that stages share."""
    every, shared = stages(), shared_classes()
    groups: dict[str, list[ResolvedStage]] = {}
    for stage in every:
        groups.setdefault(group_of(stage), []).append(stage)
    index = [
        f"# Stages\n\n{MADE} A stage is a function; a recipe step names it, or the command line runs it alone.\n",
        "Fields that several stages have are on the page [shared fields](shared.md).\n",
    ]
    pages: dict[str, str] = {}
    for group, found in groups.items():
        rows = "\n".join(f"| [`{s.name}`]({group}.md#{s.name.replace('.', '')}) | {s.stage.summary} |" for s in found)
        index.append(f"## {group}\n\n| stage | what |\n|---|---|\n{rows}\n")
        pages[f"{group}.md"] = f"# {group}\n\n{MADE}\n\n" + "\n".join(stage_section(s, shared) for s in found)
    sections = []
    for kind in shared:
        users = ", ".join(f"`{s.name}`" for s in every if kind in classes_of(s.config))
        about = (kind.__doc__ or "").strip()
        sections.append(f"## {title(kind)}\n\n{about}\n\nOf {users}.\n\n{fields_table(kind, shared)}\n")
    pages["shared.md"] = f"# Shared fields\n\n{MADE}\n\n" + "\n".join(sections)
    pages["README.md"] = "\n".join(index)
    return pages


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def flags_of(command: str) -> list[str]:
    """The long options of a command."""
    module = importlib.import_module(f"llmworks.commands.{Command.get_module_name(command)}")
    return [
        option for action in module.build_parser()._actions for option in action.option_strings if option[:2] == "--"
    ]


def names_page() -> str:
    """The page of names: ours, the library each is from, the names before 0.3, and what other libraries call it."""
    data = names()
    parts = [
        "# Names\n",
        f"{MADE} Every config field is called what the library closest to its stage calls it; a word of our own stands"
        " where no library has one. A key that is an old name, or another library's name, is answered with the name"
        " here: `unknown key 'accumulation', did you mean 'gradient_accumulation_steps'?`\n",
        "## Config fields\n",
        _row(["field", "name from", "before 0.3", "also called"]),
        "|---|---|---|---|",
    ]
    rows = [(field, library, row) for library, fields in data["fields"].items() for field, row in fields.items()]
    for field, library, row in sorted(rows):
        parts.append(_row([f"`{field}`", library, _code(row.get("was", [])), _code(row.get("also", []))]))
    for groups, keys in data["keys"].items():
        parts += [
            f"\n## Keys of other libraries without a field here: {groups}\n",
            _row(["key", "instead"]),
            "|---|---|",
        ]
        parts += [_row([f"`{key}`", text]) for key, text in sorted(keys.items())]
    parts += ["\n## Values\n", _row(["field", "value", "here"]), "|---|---|---|"]
    parts += [
        _row([f"`{field}`", f"`{other}`", f"`{ours}`"])
        for field, values in sorted(data["values"].items())
        for other, ours in values.items()
    ]
    kinds: dict[str, list[str]] = {
        "stages": [stage.name for stage in stages()],
        "inputs": sorted({name for stage in stages() for name in stage.inputs}),
        "flags": [f"{name} {flag}" for name in COMMANDS for flag in flags_of(name)],
        "metrics": sorted(data["metrics"]),
    }
    for kind, found in kinds.items():
        parts += [
            f"\n## {HEADINGS[kind]}\n",
            _row(["name", "name from", "before 0.3", "also called"]),
            "|---|---|---|---|",
        ]
        for name in found:
            row = data[kind].get(name) or {}
            was = row.get("was", [])
            parts.append(
                _row(
                    [
                        f"`{name}`",
                        row.get("from", "llmworks"),
                        _code([was] if isinstance(was, str) else was),
                        _code(row.get("also", [])),
                    ]
                )
            )
    return "\n".join(parts) + "\n"


def commands_table() -> str:
    """The README's table of commands."""
    rows = [
        f"| `llmworks {' '.join(f'{name} {command.arguments}'.split())}` | {command.summary} |".replace(
            "|path", "\\|path"
        )
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


def harness_table() -> str:
    """The fields of the lm-evaluation-harness's task files and what happens to each."""
    lines = ["| section | field | what happens |", "|---|---|---|"]
    for section, fields in read_fields().items():
        lines += [f"| {section} | `{name}` | {fate} |" for name, fate in fields.items()]
    return "\n".join(lines)


def with_table(text: str, name: str, table: str) -> str:
    """A page whose table between two marks is replaced."""
    begin, end = f"<!-- {name}: made by make docs -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = f"\n{rest}".partition(end)
    if not found or not found_end:
        raise ValueError(f"the marks of the table {name!r} are missing")
    return f"{before}{begin}{table}{end}{after}"


def labs_table() -> str:
    """Every lab: what it teaches, and the time to read it."""
    lines = ["| lab | you will learn | minutes | assets |", "|---|---|---|---|"]
    for lab in list_labs():
        link = f"[{lab.id} {lab.title}](labs/{lab.path.stem}.ipynb)"
        assets = ", ".join(f"`{name}`" for name in lab.header.assets)
        lines.append(f"| {link} | {lab.header.learn} | {lab.header.minutes} | {assets} |")
    return "\n".join(lines)


def terms_table() -> str:
    """Every term that a lab computes, with a link to its section."""
    found: dict[str, list[str]] = {}
    for lab in list_labs():
        headings = dict(reversed(list_terms(lab)))  # where a term comes first
        for topic in lab.header.topics:
            anchor = re.sub(r"[^\w\- ]", "", headings[topic.lower()].lower()).replace(" ", "-")
            found.setdefault(topic, []).append(f"[{lab.id}](labs/{lab.path.stem}.ipynb#{anchor})")
    rows = [f"| {term} | {', '.join(found[term])} |" for term in sorted(found, key=str.lower)]
    return "\n".join(["| term | lab |", "|---|---|", *rows])


def pages() -> dict[Path, str]:
    """All pages that are made of the code, as they should be."""
    readme, contributing, harness = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "lm-eval.md"
    labs = ROOT / "docs" / "labs.md"
    return {
        **{ROOT / "docs" / "stages" / name: text for name, text in stage_pages().items()},
        ROOT / "docs" / "names.md": names_page(),
        readme: with_table(readme.read_text(encoding="utf-8"), "commands", commands_table()),
        harness: with_table(harness.read_text(encoding="utf-8"), "fields", harness_table()),
        labs: with_table(with_table(labs.read_text(encoding="utf-8"), "labs", labs_table()), "terms", terms_table()),
        contributing: with_table(contributing.read_text(encoding="utf-8"), "rows", rows_table()),
    }


if __name__ == "__main__":
    (ROOT / "docs" / "stages").mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
