"""Read JSONL line by line and collect rejected rows.

A malformed line is recorded with line number and reason; it is neither dropped silently nor fatal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmworks.core.errors import DataError


@dataclass
class RejectedRows:
    """Rejected rows with their location and reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str, content: Any) -> None:
        """Record a rejected row: the whole object, or the first 2000 characters of a string."""
        kept = {"text": content[:2000]} if isinstance(content, str) else {"row": content}
        self.rows.append({"file": file, "line": line, "reason": reason, **kept})

    def write(self, out: Path, log: Callable[[str], None]) -> None:
        """Write `rejected.jsonl` when there are rejected rows, and log their count and the first reason."""
        if not self.rows:
            return
        (out / "rejected.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows),
            encoding="utf-8",
            errors="backslashreplace",
        )
        first = self.rows[0]
        log(
            f"{len(self.rows):,} row{'s' if len(self.rows) > 1 else ''} rejected, see rejected.jsonl; the first:"
            f" {first['file']} line {first['line']}: {first['reason']}"
        )


def read_jsonl(path: Path, rejected: RejectedRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every valid line. DataError for a missing or empty file."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                value = json.loads(
                    raw.decode("utf-8-sig" if number == 1 else "utf-8")
                )  # some editors write a byte order mark
            except UnicodeDecodeError as error:
                rejected.add(path.name, number, f"not UTF-8 (byte {error.start})", raw.decode("utf-8", "replace"))
                continue
            except ValueError as error:
                rejected.add(path.name, number, f"not JSON ({error})", raw.decode("utf-8"))
                continue
            if not isinstance(value, dict):
                rejected.add(path.name, number, "not a JSON object", raw.decode("utf-8"))
                continue
            yield number, value
