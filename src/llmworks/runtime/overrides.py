"""`--set key=value` into a config, and what is said of a key or a value that is wrong."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError
from llmworks.runtime.config_help import config_help

ALIASES = {"lr": "learning_rate"}  # what other tools call a field


def assign(config: dict[str, Any], names: Sequence[str], text: str) -> None:
    """Put the YAML value `text` at a dotted place of a config; in a list a place is a number, from 0.

    UserError when the place is inside a plain value, not in the list, or the text is no YAML.
    """
    place: Any = config
    for name in names[:-1]:
        inner = place[_index(place, name)] if isinstance(place, list) else place.setdefault(name, {})
        if not isinstance(inner, (dict, list)):
            raise UserError(f"{name} is {inner!r}, it has no fields")
        place = inner
    try:
        place[_index(place, names[-1]) if isinstance(place, list) else names[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not a YAML value; quote it") from None


def _index(items: Sequence[Any], name: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise UserError(f"{name!r} is no place in a list of {len(items)}; give a number from 0 to {len(items) - 1}")
    return int(name)


def unknown(what: str, name: object, known: Sequence[str]) -> str:
    """`unknown step 'sfy', did you mean 'sft'?`"""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def config_problem(model: type[Config], item: Mapping[str, Any], label: str) -> str:
    """One validation error of a config class as a line; `label` is where the config stands."""
    if item["type"] == "extra_forbidden":
        inner, last = item["loc"][:-1], str(item["loc"][-1])
        near = _nearest(model, inner, last)
        return f"{'.'.join([label, *map(str, inner)])}: " + (
            f"unknown key {last!r}, did you mean {near!r}?" if near else unknown("key", last, _fields(model, inner))
        )
    if item["type"] == "missing":
        asked = next(
            (
                f" ({kind.removesuffix(', required')}): {what}"
                for name, kind, what in config_help(model)
                if item["loc"] == (name,)
            ),
            "",
        )
        return f"{'.'.join([label, *map(str, item['loc'])])} is missing{asked}"
    told = f" (is {item['input']!r}" + ("; put it in quotes)" if item["type"] == "string_type" else ")")
    return f"{'.'.join([label, *map(str, item['loc'])])}: {item['msg'].removeprefix('Value error, ')}{told}"


def _nearest(model: type[Config], inner: Sequence[str | int], given: str) -> str:
    """The field that a wrong name means, here or one level deeper: by its name, as others call it, by its likeness."""
    here = _fields(model, inner)
    known = {leaf: f"{name}.{leaf}" for name in reversed(here) for leaf in _fields(model, (*inner, name))}
    known |= {name: name for name in here}
    given = ALIASES.get(given, given)
    alike = difflib.get_close_matches(given, known, n=1)
    return known.get(given) or (known[alike[0]] if alike else "")


def _fields(model: type[Config], path: Sequence[str | int]) -> list[str]:
    """Field names of a nested config class."""
    for name in path:
        annotation = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        kinds = [
            kind
            for kind in (annotation, *typing.get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, Config)
        ]
        if not kinds:
            return []
        model = kinds[0]
    return list(model.model_fields)
