"""Keys of another tool's configuration; each is translated, approximated, ignored as meaningless, or lost."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from llmworks.core.errors import UserError

KeyFate = Literal["otherwise", "lost", "meaningless", "unknown"]
HEADINGS: dict[KeyFate, str] = {
    "lost": "Lost: affects training and has no equivalent here",
    "otherwise": "Translated approximately",
    "meaningless": "Not needed here",
    "unknown": "Unknown to this translation",
}


@functools.cache
def load_unneeded_keys() -> dict[str, str]:
    """Load why keys are not needed here: space-separated key patterns (with *) -> reason."""
    text = Path(__file__).with_name("meaningless.yaml").read_text(encoding="utf-8")
    return {names: why for why, names in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class KeyNote:
    """Note on how one key was translated."""

    key: str
    fate: KeyFate
    text: str


@dataclass
class SourceKeys:
    """A mapping whose keys are consumed one by one; keys without a value count as absent.

    `path`: prefix of key names in notes and errors.
    """

    values: dict[str, Any]
    tool: str
    path: str = ""
    notes: list[KeyNote] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = {
            str(key): value for key, value in self.values.items() if value is not None and value != "" and value != []
        }

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, default: Any = None) -> Any:
        """Consume a key and return its value."""
        return self.values.pop(key, default)

    def take_number(self, key: str, default: float | None = None) -> Any:
        """Consume a number, as int if it is written as one. UserError for anything else."""
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

    def take_int(self, key: str, default: int | None = None) -> Any:
        """Consume an integer. UserError for anything else."""
        value = self.take_number(key, default)
        if value is not None and value != int(value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a whole number")
        return None if value is None else int(value)

    def take_bool(self, key: str) -> bool:
        """Consume a boolean; absent is false. UserError for anything else."""
        value = self.take(key, False)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is neither true nor false")
        return value

    def take_names(self, key: str) -> list[str]:
        """Consume a list of names, given as a list or comma-separated."""
        value = self.take(key, [])
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a list of names")
        return [word.strip() for word in value if word.strip()]

    def add_note(self, key: str, fate: KeyFate, text: str) -> None:
        """Record how a key was translated."""
        self.notes.append(KeyNote(self.path + key, fate, text))

    def note_approximated(self, key: str, text: str) -> None:
        """Record a key that is translated approximately."""
        self.add_note(key, "otherwise", text)

    def note_lost(self, key: str, text: str) -> None:
        """Record and consume a key that affects training and cannot be translated."""
        self.values.pop(key, None)
        self.add_note(key, "lost", text)

    def note_lost_keys(self, reasons: Mapping[str, str], harmless: tuple[Any, ...] = (False, 0)) -> None:
        """Record keys as lost unless they have a harmless value; names may contain *."""
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
                    self.add_note(key, "lost", reason)
                else:
                    self.add_note(key, "meaningless", f"set to {str(value).lower()}, and not supported here")

    def take_mapping(self, key: str) -> SourceKeys:
        """Consume a nested mapping. UserError for anything else."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a mapping")
        return SourceKeys(value, self.tool, f"{self.path}{key}.", self.notes)

    def note_remaining(self) -> None:
        """Record notes for the remaining keys."""
        for key in list(self.values):
            reason = next(
                (
                    text
                    for patterns, text in load_unneeded_keys().items()
                    if any(fnmatchcase(key, pattern) for pattern in patterns.split())
                ),
                None,
            )
            value = self.values.pop(key)
            if reason is not None:
                self.add_note(key, "meaningless", reason)
            else:
                self.add_note(
                    key, "unknown", f"set to {_shorten(value)}; check what it does before relying on this recipe"
                )


def _shorten(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
