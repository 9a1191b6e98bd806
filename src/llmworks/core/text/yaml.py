"""YAML in which a key that stands twice is an error; YAML itself silently keeps the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping with unique keys. Errors: MarkedYAMLError at the second one."""
        seen: list[Any] = []
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {name!r}", key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document. Errors: yaml.YAMLError, also for a duplicate key."""
    return yaml.load(text, Loader=UniqueKeyLoader)


def load_all_yaml(text: str) -> Iterator[Any]:
    """Yield the values of all documents of a YAML text. Errors: as `load_yaml`."""
    yield from yaml.load_all(text, Loader=UniqueKeyLoader)
