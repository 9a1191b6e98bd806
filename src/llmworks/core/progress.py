"""Progress display (a bar with rate and remaining time, or plain lines) and the metric stream (JSONL).

One `Progress` per step. A terminal gets a bar; any other output gets a line every few seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

PLAIN_INTERVAL_S = 10.0


class ProgressBar:
    """One counted loop: `advance` it as units finish, with the metrics to show."""

    def __init__(self, label: str, total: int, unit: str, stream: TextIO) -> None:
        self.label, self.total, self.unit, self.stream = label, total, unit, stream
        self.done = 0
        self.done_here = 0  # in this process, for the rate
        self.facts = ""
        self.started = time.monotonic()
        self._last_printed = self.started
        self._rich: Any = None
        self._task: Any = None
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )
            self._rich = RichProgress(*columns, console=Console(file=stream), transient=True)
            self._task = self._rich.add_task(label, total=total, facts="")
            self._rich.start()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def resume(self, done: int) -> None:
        """Start at `done` units finished by an earlier process."""
        self.done = done
        if self._rich is not None:
            self._rich.update(self._task, completed=done)

    def advance(self, n: int = 1, **facts: float | str) -> None:
        """Count `n` more units; `facts` are shown beside the bar."""
        self.done += n
        self.done_here += n
        if facts:
            self.facts = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, facts=f"{self.rate():.3g} {self.unit}/s  {self.facts}")
        elif time.monotonic() - self._last_printed >= PLAIN_INTERVAL_S:
            self._last_printed = time.monotonic()
            left = (self.total - self.done) / self.rate() if self.rate() else 0.0
            print(
                f"  {self.label}: {self.done}/{self.total} {self.unit}  {self.rate():.3g}/s  {left:.0f} s left "
                f" {self.facts}",
                file=self.stream,
                flush=True,
            )

    def rate(self) -> float:
        """Return units per second in this process."""
        elapsed = time.monotonic() - self.started
        return self.done_here / elapsed if elapsed > 0 else 0.0


class Progress:
    """Progress of one step.

    `metrics` is the file that `metric` appends to, if any; `listener` is called with each appended row.
    """

    def __init__(
        self,
        metrics: Path | None = None,
        stream: TextIO | None = None,
        quiet: bool = False,
        listener: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.metrics = metrics
        self.listener = listener
        self.stream = stream or sys.stderr
        self.quiet = quiet

    @contextmanager
    def bar(self, label: str, total: int, unit: str = "rows") -> Iterator[ProgressBar]:
        """Show a bar over a loop of `total` units."""
        import io

        with ProgressBar(label, total, unit, io.StringIO() if self.quiet else self.stream) as bar:
            yield bar

    def log(self, line: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(f"  {line}", file=self.stream, flush=True)

    def log_metrics(self, **values: Any) -> None:
        """Append one JSON object to the metric stream."""
        if self.metrics is not None:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
        if self.listener is not None:
            self.listener(values)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all rows of the metric stream, without a truncated last line."""
        if self.metrics is None or not self.metrics.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewrite_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace the metric stream: a resumed loop drops rows written after its checkpoint."""
        if self.metrics is not None:
            write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically: a kill or a full disk leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
