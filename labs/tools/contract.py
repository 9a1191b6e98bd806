"""What every lab has to have; `find_violations` lists what is missing, from the text alone.

Pictures are inspected and exercises are tried when the lab runs (`execute.py`).
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import llmworks
from labs.tools.lab import ROLES, Lab, LabError, get_roles, list_headings

SETUP = """\
# Install llmworks where it is missing, as in Colab, with the libraries that labs use.
import importlib.util
import os
import subprocess
import sys
import warnings

if importlib.util.find_spec("llmworks") is None:
    wheel = os.environ.get("LLMWORKS_WHEEL", "llmworks[labs]")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wheel], check=True)

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
warnings.filterwarnings("ignore", message="IProgress not found")
plt.rcParams["figure.figsize"] = (7, 3.6)
plt.rcParams["figure.constrained_layout.use"] = True
plt.rcParams["axes.grid"] = True"""
SECTIONS = ("Exercises", "Self-test", "What surprised us", "In llmworks", "Go on")
TEACHING = (8, 20)  # code cells beside the setup and the exercises
EXERCISES = (2, 3)
QUESTIONS = 3
WIDTH = 106  # of a line of code, so that a page shows it whole
NUMBER = re.compile(r"(?<![\w.{])\d+\.\d+(?![\w.}])")


def find_violations(lab: Lab) -> list[str]:
    """List what a lab lacks, one line each; empty when it keeps the contract."""
    checks = (
        _check_opening,
        _check_sections,
        _check_cells,
        _check_exercises,
        _check_imports,
        _check_topics,
    )
    if wrong := list(_check_syntax(lab)):
        return [f"{lab.path.name}: {line}" for line in wrong]
    return [f"{lab.path.name}: {line}" for check in (*checks, _check_end) for line in check(lab)]


def _check_syntax(lab: Lab) -> Iterator[str]:
    for number, cell in enumerate(lab.cells, 1):
        if cell.cell_type == "code":
            try:
                ast.parse(cell.source)
            except SyntaxError as error:
                yield f"cell {number}, line {error.lineno}: {error.msg}"


def _check_opening(lab: Lab) -> Iterator[str]:
    cells = lab.cells
    if not cells or not cells[0].source.startswith(f"# {lab.id} "):
        yield f"the first cell is a title: '# {lab.id} ...'"
        return
    for word in ("**You will learn**", "**Time**", "**Needs**"):
        if word not in cells[0].source:
            yield f"the first cell has no {word}"
    if lab.header.learn not in " ".join(cells[0].source.split()):
        yield "the first cell does not say what header.learn says"
    if len(cells) < 2 or get_roles(cells[1]) != {"setup"} or cells[1].source != SETUP:
        yield "the second cell is the setup cell, as SETUP of labs/tools/contract.py has it"


def _check_sections(lab: Lab) -> Iterator[str]:
    headings = [heading for cell in lab.cells for heading in list_headings(cell)]
    at = [headings.index(name) if name in headings else -1 for name in SECTIONS]
    yield from (f"has no section '{name}'" for name, place in zip(SECTIONS, at, strict=True) if place < 0)
    if -1 not in at and at != sorted(at):
        yield f"the sections are in this order: {', '.join(SECTIONS)}"


def _check_cells(lab: Lab) -> Iterator[str]:
    code = [cell for cell in lab.cells if cell.cell_type == "code"]
    for cell in code:
        if unknown := get_roles(cell) - {*ROLES}:
            yield f"unknown tag {sorted(unknown)[0]!r}; the tags are {', '.join(ROLES)}"
    apart = {"setup", "exercise", "solution", "wrong", "check"}
    teaching = [cell for cell in code if not get_roles(cell) & apart]
    if not TEACHING[0] <= len(teaching) <= TEACHING[1]:
        yield f"has {len(teaching)} code cells beside setup and exercises; {TEACHING[0]} to {TEACHING[1]} are right"
    for cell in code:
        if not get_roles(cell) & {"setup", "measured"} and (
            wide := [x for x in cell.source.split("\n") if len(x) > WIDTH]
        ):
            yield f"a line of code is wider than {WIDTH} characters: {wide[0][:60]}"
    pictures = [cell for cell in code if "picture" in get_roles(cell)]
    if not pictures:
        yield "has no picture: tag a cell 'picture'"
    for cell in pictures:
        if len(str(cell.metadata.get("alt", ""))) < 30:
            yield f"a picture has no alt text of a sentence: {_first_line(cell)}"
    if not any("parity" in get_roles(cell) and "assert" in cell.source for cell in code):
        yield "shows nowhere that a library gives the same number: tag a cell with an assert 'parity'"
    if not any("measured" in get_roles(cell) for cell in code):
        yield "has no measured surprise: tag a cell 'measured'"
    for cell in lab.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(
                r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|arXiv:\S+",
                "",
                cell.source,
                flags=re.DOTALL,
            )
            if number := NUMBER.search(prose):
                yield f"a figure stands in the prose, {number[0]}: display it from a variable ({_first_line(cell)})"


def _check_exercises(lab: Lab) -> Iterator[str]:
    try:
        exercises = lab.list_exercises()
    except LabError as error:
        yield str(error)
        return
    if not EXERCISES[0] <= len(exercises) <= EXERCISES[1]:
        yield f"has {len(exercises)} exercises; {EXERCISES[0]} to {EXERCISES[1]} are right"
    for number, exercise in enumerate(exercises, 1):
        if not exercise.wrong:
            yield f"exercise {number}: no usual wrong answer is tried (tag 'wrong')"
        asserts = [node for node in ast.walk(ast.parse(exercise.check.source)) if isinstance(node, ast.Assert)]
        if not asserts or any(node.msg is None for node in asserts):
            yield f"exercise {number}: every assert of the check says what is wrong"
        for cell in exercise.wrong:
            if not cell.source.startswith("# says: "):
                yield f"exercise {number}: a wrong answer begins with '# says: ' and words of the check's message"


def _check_imports(lab: Lab) -> Iterator[str]:
    for cell in lab.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                public = node.module == "llmworks"
                names = [f"llmworks.{a.name}" if public else node.module for a in node.names]
            for name in names:
                inner = name.removeprefix("llmworks.")
                if name.startswith("llmworks.") and inner not in llmworks.__all__:
                    yield f"imports {name}, which is not public; the public names are those of docs/python.md"


def _check_topics(lab: Lab) -> Iterator[str]:
    computed = {term for term, _ in list_terms(lab)}
    for topic in lab.header.topics:
        if topic.lower() not in computed:
            yield f"topic {topic!r} is not bold in the text before a cell that computes it"


def list_terms(lab: Lab) -> list[tuple[str, str]]:
    """List the bold terms of the text before a code cell, lower case, each with the heading that it stands under."""
    found: list[tuple[str, str]] = []
    heading, cells = lab.title, lab.cells
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        heading = next(reversed(list(list_headings(cell))), heading)
        if cell.cell_type == "markdown" and following is not None and following.cell_type == "code":
            found += [
                (" ".join(term.lower().split()), heading)
                for term in re.findall(r"\*\*(.+?)\*\*", cell.source, re.DOTALL)
            ]
    return found


def _check_end(lab: Lab) -> Iterator[str]:
    text = {name: _get_section(lab, name) for name in SECTIONS}
    if text["Self-test"].count("<details>") != QUESTIONS:
        yield f"has {text['Self-test'].count('<details>')} self-test questions with folded answers, not {QUESTIONS}"
    commands = re.findall(r"^llmworks .+$", text["In llmworks"], re.MULTILINE)
    if not commands:
        yield "names no command in 'In llmworks'"
    for command in commands:
        if complaint := find_command_error(command):
            yield f"{command!r}: {complaint}"
    if not re.search(r"arXiv:\d{4}\.\d{4,5}|\(\d{4}\)", text["Go on"]):
        yield "names no paper or book with its year or arXiv number in 'Go on'"
    if not re.search(r"\]\([FSE]\d\d_[a-z0-9_]+\.ipynb\)", text["Go on"]) and "the last lab" not in text["Go on"]:
        yield "links no next lab in 'Go on': [F02](F02_name.ipynb)"


def _get_section(lab: Lab, name: str) -> str:
    """Return the text under a heading, until the next heading of its level."""
    text = "\n".join(cell.source for cell in lab.cells if cell.cell_type == "markdown")
    found = re.search(rf"^## {re.escape(name)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def find_command_error(command: str) -> str:
    """Return what is wrong with a command line: its command, an input, a field; empty when nothing is."""
    from llmworks.commands.table import COMMANDS
    from llmworks.runtime.resolve import resolve_stage
    from llmworks.runtime.stages import STAGES

    words = shlex.split(command)[1:]
    if any(words[: len(name.split())] == name.split() for name in COMMANDS if name != "merge"):
        return ""
    name = next((n for n in (".".join(words[:2]).replace("-", "_"), words[0]) if n in STAGES), "")
    if not name:
        return "no such command"
    stage = resolve_stage(name)
    flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    for flag in sorted(flags - {*stage.inputs, "out", "set", "config", "seed", "workers", "workspace"}):
        return f"{name} has no input {flag!r}"
    for key, one in stage.inputs.items():
        if one.required and key not in flags:
            return f"{name} needs the input {key!r}"
    for key in (after for word, after in pairwise(words) if word == "--set"):
        if (field := key.partition("=")[0].partition(".")[0]) not in stage.config.model_fields:
            return f"{name} has no field {field!r}"
    return ""


def _first_line(cell: Any) -> str:
    return str(cell.source).partition("\n")[0][:60]
