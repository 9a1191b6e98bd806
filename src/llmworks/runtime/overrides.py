"""Assign `--set key=value` to a config, and describe keys and values that are wrong."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError
from llmworks.runtime.config_help import config_help
from llmworks.runtime.names import find_advice, find_field, find_value, other_names


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


def unknown(what: str, name: object, known: Sequence[str], better: str = "") -> str:
    """Describe an unknown name: `unknown step 'sfy', did you mean 'sft'?`; `better`: what it means, where that is
    known.
    """
    near = [better] if better else difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def config_problem(model: type[Config], item: Mapping[str, Any], label: str, stage: str = "") -> str:
    """Describe one validation error of a config class in a line.

    label: where the config is. stage: whose config it is, for advice on other libraries' keys.
    """
    inner, last = item["loc"][:-1], str(item["loc"][-1]) if item["loc"] else ""
    where = ".".join([label, *map(str, item["loc"])])
    if item["type"] == "extra_forbidden":
        place = ".".join([label, *map(str, inner)])
        near = _nearest(model, inner, last, bool(find_advice(stage, last)))
        if near:
            return f"{place}: unknown key {last!r}, did you mean {near!r}?"
        advice = find_advice(stage, last)
        return f"{place}: " + (
            f"unknown key {last!r}: {advice}" if advice else unknown("key", last, _fields(model, inner))
        )
    if item["type"] == "missing":
        missing = next(
            (
                f" ({kind.removesuffix(', required')}): {what}"
                for name, kind, what in config_help(model)
                if item["loc"] == (name,)
            ),
            "",
        )
        return f"{where} is missing{missing}"
    if item["type"] == "string_type" and isinstance(item["input"], list):
        return f"{where}: takes one string, not a list of {len(item['input'])}; run the stage once for each"
    ours = find_value(last, item["input"])
    shown = f" (is {item['input']!r}" + ("; put it in quotes)" if item["type"] == "string_type" else ")")
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}" + (
        f", did you mean {ours!r}?" if ours else ""
    )


def _nearest(model: type[Config], inner: Sequence[str | int], given: str, advised: bool) -> str:
    """The field that a wrong name means, here or one level deeper: as others call it, then by its likeness.

    advised: there is other advice on this name; then no field is guessed by likeness.
    """
    here = _fields(model, inner)
    known = {name: name for name in here}
    for name in here:
        for leaf in _fields(model, (*inner, name)):
            known.setdefault(leaf, f"{name}.{leaf}")
    if place := known.get(given) or find_field(given, known):
        return place
    spelled = {**{name: find_field(name, known) for name in other_names()}, **known}  # a misspelled old name, too
    alike = [] if advised else difflib.get_close_matches(given, [name for name in spelled if spelled[name]], n=1)
    return spelled[alike[0]] if alike else ""


def _fields(model: type[Config], path: Sequence[str | int]) -> list[str]:
    """Field names of a nested config class."""
    for name in path:
        if isinstance(name, int):  # an item of a list of configs
            continue
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
