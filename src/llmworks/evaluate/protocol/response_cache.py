"""Cache of engine responses by digest, per model and workspace: other metrics, more rows or a changed task only request
what is new.

One file per model and engine, beside the scratch directories, appended under a lock; `llmworks gc --scratch` deletes
it. Does not know tasks.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REVISION = 1  # version of engine behavior; raise it to invalidate all cached responses


class ResponseCache:
    """Cached results by key, of one model on one engine."""

    def __init__(self, folder: Path, model: str, engine: str) -> None:
        self.file = folder / f"responses-{model[:16]}-{engine}-{REVISION}.jsonl"

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Look up these keys. Lines truncated by an interruption are skipped."""
        wanted, found = set(keys), {}
        if self.file.exists():
            with self.file.open(encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    try:
                        key, value = json.loads(line)
                    except (ValueError, TypeError):
                        continue
                    if key in wanted:
                        found[key] = value
        return found

    def add(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Append results; safe for concurrent processes."""
        if not results:
            return
        with self.file.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            text = "".join(json.dumps([key, dict(value)], ensure_ascii=False) + "\n" for key, value in results.items())
            stream.write(b"\n" + text.encode("utf-8", "replace"))  # a new line first: the last one may be truncated
