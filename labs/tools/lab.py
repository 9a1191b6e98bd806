"""Read a lab: its header, its cells by role, its exercises.

A lab is a Python script in jupytext's percent format. The header is the key `lab` of the notebook's metadata; the role
of a cell is its tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jupytext
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LABS = Path(__file__).parents[1]
NAME = re.compile(r"([FSE]\d\d)_[a-z0-9_]+")
ROLES = ("setup", "picture", "parity", "exercise", "solution", "wrong", "check", "measured")
HIDDEN = ("solution", "wrong")  # not in the learner's notebook


class LabError(Exception):
    """A lab that breaks its contract, or a run that fails; the message is one line."""


class Header(BaseModel):
    """Facts about a lab that tools read; `lab:` in the notebook's metadata."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learn: str = Field(description="what the reader will learn, one sentence")
    minutes: int = Field(gt=0, description="time to read and to do the exercises")
    budget_seconds: int = Field(gt=0, le=300, description="time to run on one thread; twice as much fails")
    needs: list[str] = Field([], description="labs to read before")
    assets: list[str] = Field([], description="assets that the lab loads")
    topics: list[str] = Field(
        description="terms of the roadmap; each is bold in the text before a cell that computes it"
    )


@dataclass
class Exercise:
    """A task: stub, solution, usual wrong answers, and the check that tells them apart."""

    stub: Any
    solution: Any
    check: Any
    wrong: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Lab:
    """A lab as read from its script."""

    path: Path
    header: Header
    notebook: Any

    @property
    def id(self) -> str:
        """`F01` of `F01_linear_algebra.py`."""
        return self.path.stem.partition("_")[0]

    @property
    def cells(self) -> list[Any]:
        """The cells, in order."""
        return list(self.notebook.cells)

    @property
    def title(self) -> str:
        """The first heading, without the lab's number."""
        first = self.cells[0].source.partition("\n")[0] if self.cells else ""
        return first.removeprefix("# ").removeprefix(f"{self.id} ")

    def list_exercises(self) -> list[Exercise]:
        """Group the cells of each exercise; LabError when one of them is missing or out of order."""
        found: list[Exercise] = []
        stub = solution = None
        wrong: list[Any] = []
        for cell in self.cells:
            roles = get_roles(cell)
            if "exercise" in roles:
                stub, solution, wrong = cell, None, []
            elif "solution" in roles:
                solution = cell
            elif "wrong" in roles:
                wrong.append(cell)
            elif "check" in roles:
                if stub is None or solution is None:
                    raise LabError(f"{self.id}: exercise {len(found) + 1} needs the cells exercise, solution, check")
                found.append(Exercise(stub, solution, cell, wrong))
                stub, solution, wrong = None, None, []
        if stub is not None:
            raise LabError(f"{self.id}: exercise {len(found) + 1} has no check")
        return found


def get_roles(cell: Any) -> set[str]:
    """Return the tags of a cell."""
    return set(cell.metadata.get("tags", []))


def list_headings(cell: Any) -> Iterator[str]:
    """List the headings of a markdown cell; `#` inside of a code block is no heading."""
    if cell.cell_type == "markdown":
        for line in re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL).splitlines():
            if line.startswith("#"):
                yield line.lstrip("#").strip()


def read_lab(path: Path) -> Lab:
    """Read one script; LabError when its name or header is wrong."""
    if not NAME.fullmatch(path.stem):
        raise LabError(f"{path.name}: a lab is called F01_name.py, S01_name.py or E01_name.py")
    try:
        notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
        header = Header.model_validate(notebook.metadata.get("lab", {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise LabError(f"{path.name}: header, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return Lab(path, header, notebook)


def list_labs(folder: Path = LABS) -> list[Lab]:
    """Read all labs of a folder, fundamentals first."""
    paths = [path for path in folder.glob("*.py") if NAME.fullmatch(path.stem)]
    return [read_lab(path) for path in sorted(paths, key=lambda path: ("FSE".index(path.stem[0]), path.stem))]
