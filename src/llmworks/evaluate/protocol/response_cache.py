"""What a model was asked before in this workspace, by digest: other metrics, more rows or a changed task ask only what
is new.

One file of a model on an engine, beside the scratch directories, added to under a lock; `llmworks gc --scratch` forgets
it. Knows no task.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REVISION = 1  # of what engines answer; another one asks everything again


class Memory:
    """Findings by key, of one model on one engine."""

    def __init__(self, folder: Path, model: str, engine: str) -> None:
        self.file = folder / f"asked-{model[:16]}-{engine}-{REVISION}.jsonl"

    def recall(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of these keys. Lines that were cut short by a kill are passed over."""
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

    def add(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep findings; several processes may do so at once."""
        if not findings:
            return
        with self.file.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            text = "".join(json.dumps([key, dict(value)], ensure_ascii=False) + "\n" for key, value in findings.items())
            stream.write(
                b"\n" + text.encode("utf-8", "replace")
            )  # a new line first: the last one may have been cut short
