"""Write the notebooks of a lab: the learner's, with the exercises open, and the executed one for the page."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat

from labs.tools.lab import HIDDEN, Lab, get_roles

FOLDED = {"setup": "hide-cell", "solution": "hide-cell", "measured": "hide-input"}
PROMPTS = {"setup": "Setup", "solution": "Solution", "measured": "Code"}


def write_learner(lab: Lab, path: Path) -> None:
    """Write the notebook without solutions and outputs."""
    notebook = _copy(lab.notebook)
    notebook.cells = [cell for cell in notebook.cells if not get_roles(cell) & {*HIDDEN}]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_page(lab: Lab, executed: Path | None, path: Path) -> None:
    """Write the executed notebook as the site shows it: solutions folded, alt texts at the pictures.

    `executed`: None for a lab that is not built; its page has no results.
    """
    notebook = _copy(nbformat.read(executed, as_version=4) if executed else lab.notebook)
    notebook.cells = [cell for cell in notebook.cells if "wrong" not in get_roles(cell)]
    first = notebook.cells[0]
    first.source += f"\n\n{{download}}`Notebook to work in <learner/{lab.path.stem}.ipynb>` · " + (
        f"{{download}}`executed, with solutions <executed/{lab.path.stem}.ipynb>`"
        if executed
        else "not executed here: `make labs` adds the results"
    )
    for cell in notebook.cells:
        roles = get_roles(cell)
        cell.metadata["tags"] = sorted({*roles, *(FOLDED[role] for role in roles if role in FOLDED)})
        shown: dict[str, Any] = {}
        if alt := cell.metadata.pop("alt", ""):
            shown["image"] = {"alt": alt}
        for role in roles & {*PROMPTS}:
            shown |= {"code_prompt_show": PROMPTS[role], "code_prompt_hide": PROMPTS[role]}
        if shown:
            cell.metadata["mystnb"] = shown
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_executed(executed: Path, path: Path) -> None:
    """Write the executed notebook with its solutions, without the wrong answers."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "wrong" not in get_roles(cell)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def _copy(notebook: Any) -> Any:
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("jupytext", None)
    return notebook
