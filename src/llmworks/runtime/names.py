"""What names mean here: names before 0.3 and other libraries' names for a config field, stage, input or value.

`names.yaml` is the data. It answers unknown keys (`config/errors.py`) and makes `docs/names.md`. It is read only when a
name is unknown.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

import yaml


@functools.cache
def names() -> dict[str, Any]:
    """The parsed `names.yaml`."""
    data: dict[str, Any] = yaml.safe_load(files("llmworks.runtime").joinpath("names.yaml").read_text(encoding="utf-8"))
    return data


@functools.cache
def _fields_by_name() -> dict[str, list[str]]:
    """Each other name of a field -> the fields here that it may mean; names before 0.3 come first."""
    found: dict[str, list[str]] = {}
    rows = [row for library in names()["fields"].values() for row in library.items()]
    for kind in ("was", "also"):
        for field, other in rows:
            for name in other.get(kind, ()):
                found.setdefault(name, []).append(field)
    return found


def other_names() -> list[str]:
    """Every name of a field that is not ours."""
    return list(_fields_by_name())


def find_field(name: str, known: Mapping[str, str]) -> str:
    """The place of the field that another library calls `name`, or "".

    known: field name -> its place in the config, as {"max_grad_norm": "optimizer.max_grad_norm"}; the nearest first.
    """
    candidates = _fields_by_name().get(name, [])
    return next((place for field, place in known.items() if field in candidates), "")


def find_advice(stage: str, name: str) -> str:
    """What to do instead of a key of other libraries that has no field here, or ""."""
    group = stage.partition(".")[0]
    for groups, keys in names()["keys"].items():
        if group in groups.split(", ") and name in keys:
            return str(keys[name])
    return ""


def find_value(field: str, value: object) -> str:
    """Our value of a field for another library's, or ""."""
    values = names()["values"].get(field, {})
    return str(values.get(value, "")) if isinstance(value, str | int) else ""


def find_stage(name: str, known: Iterable[str]) -> str:
    """The stage that was called `name`, or that others call so, or ""."""
    known = set(known)
    if name.replace("-", "_") in known:
        return name.replace("-", "_")
    for stage, row in names()["stages"].items():
        if stage in known and name in (row.get("was"), *row.get("also", ())):
            return str(stage)
    return ""


def find_input(name: str, known: Iterable[str]) -> str:
    """The input that was called `name`, or that others call so, or ""."""
    known = list(known)
    for kind in ("was", "also"):
        for given, row in names()["inputs"].items():
            if given in known and name in row.get(kind, ()):
                return str(given)
    return ""


def find_flag(command: str, flag: str) -> str:
    """The flag of a command that was called `flag`, or ""."""
    for row, other in names()["flags"].items():
        of, _, ours = row.rpartition(" ")
        if of == command and other["was"] == flag:
            return str(ours)
    return ""
