"""Print results: lines and tables, or JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmworks.runtime.execute import StageResult


def print_line(text: str = "") -> None:
    """Print one line of the result."""
    print(text)


def print_json(value: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_table(columns: tuple[str, ...], rows: list[Any]) -> None:
    """Print a plain table; the last column takes the remaining width of the terminal."""
    from rich.console import Console
    from rich.table import Table

    view = Table(box=None, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        view.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        view.add_row(*(str(v).replace("[", "\\[") for v in row))
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160, highlight=False).print(view)


def relative_path(path: Path) -> Path:
    """Return a path relative to the current directory, if it is below it."""
    return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path


def shorten(value: Any) -> str:
    """Return a value on one line, shortened."""
    text = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 70 else text[:69] + "…"


def format_amount(value: float, unit: str) -> str:
    """Format a value with its unit; empty for zero."""
    return f"{value:.0f} {unit}" if value else ""


def stage_result_to_json(outcome: StageResult) -> dict[str, Any]:
    """Return a stage's result for JSON output."""
    artifact = outcome.artifact
    return {"path": str(artifact.path), "digest": artifact.digest, "made": outcome.is_new, "metrics": artifact.metrics}


def print_stage_result(stage: str, name: Path | None, outcome: StageResult) -> None:
    """Print a stage's result: the artifact, its path, and the report's terminal text."""
    from llmworks.core.report import TERMINAL_FILE
    from llmworks.runtime.runner import format_metrics
    from llmworks.tokenize.view import strip_colors

    artifact = outcome.artifact
    terminal = artifact.path / TERMINAL_FILE
    if terminal.exists():
        text = terminal.read_text(encoding="utf-8")
        print_line((text if sys.stdout.isatty() else strip_colors(text)).rstrip("\n") + "\n")
    print_line(
        f"✓ {stage}  {artifact.kind} {artifact.digest[:12]} "
        f" {'up to date' if not outcome.is_new else f'{outcome.seconds:.1f} s'}  {format_metrics(artifact.metrics)}"
    )
    if name is None:
        print_line(f"Report: {relative_path(artifact.path / 'report.html')}")
    else:
        chat = f'  llmworks chat {name} "Hello"\n' if artifact.kind == "model" else ""
        print_line(f"Result: {name}\nNext:\n{chat}  llmworks show {name}\n  llmworks tree {name}")
