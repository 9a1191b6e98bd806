"""What a stage is given besides its config and inputs. Knows no stage, no recipe and no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmworks.core.artifact import Artifact, FileEntry
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Engine
from llmworks.core.workers import Pool


@dataclass(frozen=True)
class Context:
    """`out` is an empty directory to write the result into; `scratch` survives a kill and holds what resuming needs.

    `pool` runs independent parts of the work; no result depends on it. `digests` takes those of files, by their names
    in `out`, that a stage computed while it wrote them.
    """

    out: Path
    scratch: Path
    seed: int
    progress: Progress
    report: ReportBuilder
    open_engine: Callable[[Artifact], Engine]
    pool: Pool = field(default_factory=Pool)
    digests: dict[str, FileEntry] = field(default_factory=dict)
