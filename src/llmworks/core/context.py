"""What a stage receives besides its config and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmworks.core.artifact import Artifact, FileEntry
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Engine
from llmworks.core.workers import WorkerPool


@dataclass(frozen=True)
class Context:
    """`out`: empty output directory. `scratch`: directory that survives a kill, for checkpoints.

    `pool` runs independent units of work; results do not depend on it. `digests` collects file digests, by name in
    `out`, that a stage computed while writing.
    """

    out: Path
    scratch: Path
    seed: int
    progress: Progress
    report: ReportBuilder
    open_engine: Callable[[Artifact], Engine]
    pool: WorkerPool = field(default_factory=WorkerPool)
    digests: dict[str, FileEntry] = field(default_factory=dict)
