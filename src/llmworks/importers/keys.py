"""The keys of another tool's configuration, each of which must be accounted for: translated, done otherwise, without
meaning here, or lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from llmworks.core.errors import UserError

Fate = Literal["otherwise", "lost", "meaningless", "unknown"]
HEADINGS: dict[Fate, str] = {
    "lost": "Lost: it changes what is learned, and there is nothing like it here",
    "otherwise": "Done otherwise",
    "meaningless": "Without meaning here",
    "unknown": "Not known to this translation",
}


@functools.cache
def meaningless() -> dict[str, str]:
    """Why keys say nothing here, by their names, which may have a *; several with spaces between."""
    text = Path(__file__).with_name("meaningless.yaml").read_text(encoding="utf-8")
    return {names: why for why, names in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class Note:
    """What became of one key."""

    key: str
    fate: Fate
    text: str


@dataclass
class Keys:
    """A mapping whose keys are taken one by one; keys without a value count as absent.

    `path`: where it stands, before a key's name in notes and errors.
    """

    values: dict[str, Any]
    tool: str
    path: str = ""
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = {
            str(key): value for key, value in self.values.items() if value is not None and value != "" and value != []
        }

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key that is translated."""
        return self.values.pop(key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """The number of a key, whole where it is. UserError for anything else."""
        value = self.take(key, default)
        if value is None:
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a number") from None
        if isinstance(value, bool) or found != found or abs(found) == float("inf"):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a number")
        return (
            int(found)
            if found == int(found) and not (isinstance(value, float) or "." in str(value) or "e" in str(value).lower())
            else found
        )

    def whole(self, key: str, default: int | None = None) -> Any:
        """The whole number of a key. UserError for anything else."""
        value = self.number(key, default)
        if value is not None and value != int(value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a whole number")
        return None if value is None else int(value)

    def flag(self, key: str) -> bool:
        """Whether a key is set to something true. UserError for what is neither."""
        value = self.take(key, False)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is neither true nor false")
        return value

    def words(self, key: str) -> list[str]:
        """A list of words, as a list or with commas between."""
        value = self.take(key, [])
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is no list of names")
        return [word.strip() for word in value if word.strip()]

    def note(self, key: str, fate: Fate, text: str) -> None:
        """Say what became of a key."""
        self.notes.append(Note(self.path + key, fate, text))

    def otherwise(self, key: str, text: str) -> None:
        """A key that is done in another way."""
        self.note(key, "otherwise", text)

    def lost(self, key: str, text: str) -> None:
        """A key that changes what is learned, and cannot be translated; taken, if it still stands."""
        self.values.pop(key, None)
        self.note(key, "lost", text)

    def lose(self, reasons: Mapping[str, str], harmless: tuple[Any, ...] = (False, 0)) -> None:
        """Keys that are lost where they are set to anything but a harmless value; names may have *."""
        for key in list(self.values):
            reason = next(
                (
                    text
                    for patterns, text in reasons.items()
                    if any(fnmatchcase(key, pattern) for pattern in patterns.split())
                ),
                None,
            )
            if reason is not None:
                value = self.take(key)
                if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
                    self.note(key, "lost", reason)
                else:
                    self.note(key, "meaningless", f"{str(value).lower()} there, and there is no such thing here")

    def inner(self, key: str) -> Keys:
        """The mapping under a key. UserError when it is none."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is no mapping")
        return Keys(value, self.tool, f"{self.path}{key}.", self.notes)

    def finish(self) -> None:
        """Account for the keys that nobody took."""
        for key in list(self.values):
            reason = next(
                (
                    text
                    for patterns, text in meaningless().items()
                    if any(fnmatchcase(key, pattern) for pattern in patterns.split())
                ),
                None,
            )
            value = self.values.pop(key)
            if reason is not None:
                self.note(key, "meaningless", reason)
            else:
                self.note(key, "unknown", f"is {_short(value)} there; see what it does before you rely on this recipe")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
