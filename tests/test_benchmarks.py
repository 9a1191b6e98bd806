"""Every benchmark starts: its module imports, and what it imports later is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MINE = sorted(file.name for file in BENCHMARKS.glob("*.py") if file.name != "quantize_peers.py")


def missing(file: Path) -> list[str]:
    """Names of this project that a file imports anywhere, and that are not there."""
    lost = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmworks"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        lost.append(f"{file.name}:{node.lineno}: {node.module}.{alias.name}")
    return lost


@pytest.mark.parametrize("name", MINE)
def test_a_benchmark_starts(name: str) -> None:
    assert missing(BENCHMARKS / name) == []
    code = f"import runpy, sys; sys.path.insert(0, {str(BENCHMARKS)!r}); runpy.run_path({str(BENCHMARKS / name)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    file = tmp_path / "b.py"
    file.write_text("def f():\n    from llmworks.core.errors import Gone, UserError\n")
    assert missing(file) == ["b.py:2: llmworks.core.errors.Gone"]
