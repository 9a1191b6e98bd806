"""The house stands as designed: imports go down the rows, stage files are torch-free, help is instant, table and docs
agree.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llmworks.runtime.config_help import config_help
from llmworks.runtime.resolve import resolve
from llmworks.runtime.stages import STAGES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "llmworks"

# Rows from the bottom up. Rooms of one row do not know one another, except in rows 1 and 9, where the order of the list
# holds.
ROWS: list[list[str]] = [
    ["core", "assets", "lineage"],
    ["tokenize", "embed", "guard", "sandbox", "observe", "importers"],
    ["data", "model", "score"],
    ["generate"],
    ["train", "merge", "quantize", "interpret"],
    ["align", "evaluate", "retrieve", "synthesize"],
    ["rag", "agent", "tune"],
    ["serve", "studio", "deploy"],
    ["runtime", "workflows", "commands", "cli"],
]
ORDERED = (0, 8)


def room(module: str) -> str:
    """`llmworks.model.lora.lora` -> `model`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def place(name: str) -> tuple[int, int]:
    """(row, position) of a room."""
    for row, rooms in enumerate(ROWS):
        if name in rooms:
            return row, rooms.index(name)
    raise AssertionError(f"{name} has no row in the house")


def imports_of(file: Path) -> list[str]:
    """llmworks modules that a file imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llmworks":
            found += [f"llmworks.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmworks."):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("llmworks.")]
    return found


def allowed(importer: str, imported: str) -> bool:
    """Whether a room may know another."""
    if importer == imported:
        return True
    (row, at), (other_row, other_at) = place(importer), place(imported)
    return other_row < row or (other_row == row and row in ORDERED and other_at < at)


def violations(source: Path) -> list[str]:
    """Every import that goes up or sideways."""
    found = []
    for file in sorted(source.rglob("*.py")):
        importer = file.relative_to(source).with_suffix("").parts[0]
        if importer == "__init__":
            continue
        found += [f"{file.name} imports {m}" for m in imports_of(file) if not allowed(importer, room(m))]
    return found


def test_imports_go_down_the_rows() -> None:
    assert violations(SOURCE) == []


def test_the_import_rule_finds_a_violation(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.py").write_text(
        "from llmworks.train.loop.loop import train\nfrom llmworks.score import SCORES\n"
    )
    assert len(violations(tmp_path)) == 2


def test_stage_files_are_torch_free() -> None:
    names = list(STAGES)
    code = (
        f"import sys, warnings\nfrom llmworks.runtime.stages import resolve\nfor name in {names!r}:\n   "
        " resolve(name)\n    assert 'torch' not in sys.modules and 'transformers' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_stage_is_documented() -> None:
    for name in STAGES:
        stage = resolve(name)
        assert stage.help, name
        assert all(description for _, _, description in config_help(stage.config)), name
        assert stage.inputs, name


def test_help_is_instant_and_light() -> None:
    def cpu() -> float:
        import resource

        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu()
    done = subprocess.run([sys.executable, "-m", "llmworks.cli", "--help"], capture_output=True, text=True, check=True)
    assert cpu() - before < 0.3
    for name in STAGES:
        assert name.replace(".", " ") in done.stdout
    code = (
        "import sys\nfrom llmworks.cli import main\nmain(['--help'])\nassert not {'torch', 'pydantic', 'rich'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "words", [["run", "--help"], ["train", "sft", "--help"], ["evaluate", "--help"], ["evaluate", "compare", "--help"]]
)
def test_command_help(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "llmworks.cli", *words], capture_output=True, text=True, check=True)
    assert "usage: llmworks" in done.stdout


def test_docs_are_those_of_the_stages() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = (ROOT / "docs" / "stages.md").read_text()
    assert text.count("\n## ") == len(STAGES)
    assert text == generate.stages_page(), "docs/stages.md is stale; run make docs"


def test_rooms_are_small() -> None:
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert file.read_text().count("\n") <= 620, f"{file} is crowded; split it by noun"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 130, f"{file}: {node.name} is long"


def test_project_names_no_place_or_host() -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt") or path.name == "Makefile":
            text = path.read_text(encoding="utf-8")
            for word in ("/ro" + "ot/", "files.python" + "hosted", "pypi" + ".org"):
                assert word not in text, f"{name} names {word}"
