"""Assign `--set key=value` to a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from llmworks.core.errors import UserError


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
