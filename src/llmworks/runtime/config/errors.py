"""Describe what is wrong with a config, one line for each wrong field, and what to write instead."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmworks.core.artifact import Config
from llmworks.runtime.config.help import config_help
from llmworks.runtime.names import find_advice, find_field, find_input, find_value, other_names
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.stages import get_stages

SIMILARITY = 0.75  # of a misspelled name to a known one, by difflib
Location = tuple[str | int, ...]
TYPE_NAME = re.compile(r"str|int|float|bool|none|(literal|list|dict|tuple|function)[-\w]*\[.*")


def unknown(what: str, name: object, known: Sequence[str], better: str = "") -> str:
    """Describe an unknown name: `unknown step 'sfy', did you mean 'sft'?`; `better`: what it means, where that is
    known.
    """
    near = [better] if better else difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def describe_errors(
    model: type[Config], errors: Iterable[Mapping[str, Any]], label: str, stage: str = ""
) -> list[tuple[Location, str]]:
    """Describe pydantic's errors of a config class; returns (location of the field, one line) of each wrong field.

    The errors of all alternatives of a field's type become one. label: where the config is. stage: whose config it is,
    for advice on other libraries' keys.
    """
    found: dict[Location, list[Mapping[str, Any]]] = {}
    for item in errors:
        found.setdefault(_find_location(item), []).append(item)
    return [(place, _describe(model, place, items, label, stage)) for place, items in found.items()]


def _find_location(item: Mapping[str, Any]) -> Location:
    """Return where an error is, without the names of types that pydantic adds for a union."""
    *inner, last = item["loc"] or ("",)
    if item["type"] != "extra_forbidden" and _is_type_name(last):
        return tuple(part for part in inner if not _is_type_name(part))
    return tuple(part for part in (*inner, last) if part == last or not _is_type_name(part)) if item["loc"] else ()


def _is_type_name(part: str | int) -> bool:
    if not isinstance(part, str):
        return False
    return bool(TYPE_NAME.fullmatch(part)) or part in _class_names(Config)


def _class_names(kind: type[Config]) -> set[str]:
    return {kind.__name__}.union(*(_class_names(inner) for inner in kind.__subclasses__()))


def _describe(model: type[Config], place: Location, items: Sequence[Mapping[str, Any]], label: str, stage: str) -> str:
    item, inner, last = items[0], place[:-1], str(place[-1]) if place else ""
    where = ".".join([label, *map(str, place)])
    if item["type"] == "extra_forbidden":
        return ".".join([label, *map(str, inner)]) + ": " + _describe_unknown(model, inner, last, item["input"], stage)
    if item["type"] == "missing":
        kinds = {name: f" ({kind.removesuffix(', required')}): {what}" for name, kind, what in config_help(model)}
        return f"{where} is missing{kinds.get('.'.join(map(str, place)), '')}"
    value = item["input"]
    if any(one["type"] == "string_type" for one in items) and isinstance(value, list):
        return f"{where}: takes one string, not a list of {len(value)}; run the stage once for each"
    if fields := _fields(model, place):
        if not isinstance(value, Mapping):
            return f"{where}: has fields ({', '.join(fields[:4])} ...), not one value; set {last}.{fields[0]}"
        if item["type"] == "value_error":  # about several fields, which the message names
            return f"{where}: {item['msg'].removeprefix('Value error, ')}"
    wanted = " or ".join(dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in items))
    form = {"list_type": "a list is written [A, B]", "dict_type": "a mapping is written {NAME: VALUE}"}
    shown = [f"got {value!r}"] + ["put it in quotes"] * (item["type"] == "string_type")
    shown += [form[one["type"]] for one in items if one["type"] in form]
    ours = find_value(last, value)
    return f"{where}: {wanted} ({'; '.join(shown)})" + _format_value_hint(ours)


def _format_value_hint(ours: str) -> str:
    if re.fullmatch(r"[\w-]*", ours):
        return f", did you mean {ours!r}?" if ours else ""
    return f"; use {ours}"  # fields with values, or another stage


def _describe_unknown(model: type[Config], inner: Location, name: str, value: object, stage: str) -> str:
    """Say what an unknown key means: a field, something else to do, an input of the stage, or a misspelled name."""
    here = _fields(model, inner)
    known = {one: one for one in here}
    for one in here:
        for leaf in _fields(model, (*inner, one)):
            known.setdefault(leaf, f"{one}.{leaf}")
    if field := known.get(name) or find_field(name, known):
        ours = find_value(field.rpartition(".")[2], value)
        return unknown("key", name, here, f"{field}: {ours}" if ours and ":" not in ours else field)
    if advice := find_advice(stage, name):
        return f"unknown key {name!r}: {advice}"
    inputs = resolve_stage(stage).inputs if stage in get_stages() else {}
    if given := name if name in inputs else find_input(name, inputs):
        return f"unknown key {name!r}: it is the input `{given}` (--{given.replace('_', '-')})"
    spelled = {**{other: find_field(other, known) for other in other_names()}, **known}  # a misspelled old name, too
    alike = difflib.get_close_matches(name, [one for one in spelled if spelled[one]], n=1, cutoff=SIMILARITY)
    alike = alike or [one for one in known if one.startswith(f"{name}_")]
    return unknown("key", name, here, spelled[alike[0]]) if alike else f"unknown key {name!r}; known: {', '.join(here)}"


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
