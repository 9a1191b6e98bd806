"""Artifacts: a directory in its ecosystem's own format plus `manifest.json`, published atomically, then immutable.

Model, Adapter, Tokenizer, Dataset, Index and Report differ in what the directory holds; the manifest has one schema. A
manifest means complete: it is written last, into a temporary directory that is then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmworks.core.errors import ArtifactError

MANIFEST = "manifest.json"
Derivation = Literal["exact", "exact-on-this-platform", "declared"]


class Config(BaseModel):
    """Base of every stage's config: frozen, no unknown keys; a field's description is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with some fields changed, unchecked but for their names: pydantic itself takes unknown ones silently."""
        unknown = set(update or ()) - set(type(self).model_fields)
        assert not unknown, f"{type(self).__name__} has no fields {sorted(unknown)}"
        return super().model_copy(update=update, deep=deep)

    def reads(self) -> tuple[str, ...]:
        """Return the files that the config names and the stage reads: their contents are part of the step key."""
        return ()


class GoldenConversation(Config):
    """A conversation with its exact token ids, loss mask, and the largest next-token logits at some positions."""

    messages: list[dict[str, Any]] = Field(description="JSON form of the conversation; empty when `text` is given")
    tools: list[dict[str, Any]] = Field(default=[], description="functions in the prompt")
    text: str = Field("", description="plain text, for a model without a chat template")
    ids: list[int] = Field(description="token ids of the rendered conversation")
    mask: list[int] = Field(description="loss mask: 1 where a token is trained on")
    positions: list[int] = Field(description="indices into `ids` after which logits are recorded")
    top_ids: list[list[int]] = Field(description="per position, the ids of the 32 largest logits, largest first")
    top_logits: list[list[float]] = Field(description="per position, the logits of `top_ids`")
    logsumexp: list[float] = Field([], description="per position, log-sum-exp of all logits; empty in older records")
    spread_ids: list[list[int]] = Field([], description="per position, ids evenly spread over the vocabulary")
    spread_logits: list[list[float]] = Field([], description="per position, the logits of `spread_ids`")


class Golden(Config):
    """Golden tokens: conversations and stop ids that a model must reproduce after every step."""

    conversations: list[GoldenConversation] = Field(description="a few short conversations")
    stop_ids: list[int] = Field(description="stop token ids")


class Parent(Config):
    """An artifact that a step consumed, with its role."""

    role: str = Field(description="name of the stage's input, with [key] for a list or dict")
    name: str = Field(description="display name: a step's name or a reference")
    kind: str = Field(description="artifact kind")
    digest: str = Field(description="the parent's digest, hexadecimal")
    ref: str = Field(description="reference to find it outside the workspace; empty for a step's result")
    manifest: str = Field("", description="SHA-256 of the parent's manifest when it was used; empty: it had none")


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str = Field(description="SHA-256 of its bytes")
    bytes: int = Field(description="size in bytes")


class Manifest(Config):
    """The record of an artifact: everything that determines its bytes, and everything measured while making it."""

    format: Literal[1] = Field(1, description="version of this schema")
    kind: str = Field(description="model, adapter, tokenizer, dataset, index or report")
    digest: str = Field(description="SHA-256 over kind, key and file digests")
    key: str = Field(
        description=(
            "SHA-256 over stage, revision, config, seed and the parents' digests; empty for an external artifact"
        )
    )
    stage: str = Field(description="stage that made it; empty for an external artifact")
    revision: int = Field(description="the stage's revision")
    derivation: Derivation = Field(description="reproducibility of the bytes")
    config: dict[str, Any] = Field(description="resolved configuration, every field")
    parents: list[Parent] = Field(description="artifacts it was made from")
    files: dict[str, FileEntry] = Field(description="digest and size by relative path, without this file")
    code: str = Field("", description="digest of the stage's source and what it imports from llmworks")
    versions: dict[str, str] = Field(default={}, description="versions of the relevant libraries")
    platform: dict[str, str] = Field(default={}, description="machine, processor, operating system, Python")
    threads: int = Field(0, description="threads used by tensor operations")
    seed: int = Field(0, description="the run's seed")
    started: str = Field("", description="UTC, ISO 8601")
    finished: str = Field("", description="UTC, ISO 8601")
    metrics: dict[str, Any] = Field(default={}, description="metrics measured by the step")
    about: dict[str, Any] = Field(default={}, description="facts for readers: schema kind, rows, dtype, base digest")
    golden: Golden | None = Field(None, description="golden tokens of a model or adapter")


class Artifact:
    """A directory of one kind. A draft (being written by a stage) has no manifest yet."""

    kind: ClassVar[str] = "artifact"

    def __init__(
        self,
        path: Path,
        *,
        manifest: Manifest | None = None,
        name: str = "",
        ref: str = "",
        metrics: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
        golden: Golden | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self.name = name or self.path.name
        self.ref = ref
        self.manifest_digest = ""  # of the manifest's file; empty for a draft and for an external artifact
        self.metrics: dict[str, Any] = manifest.metrics if manifest else dict(metrics or {})
        self.about: dict[str, Any] = manifest.about if manifest else dict(about or {})
        self.golden: Golden | None = manifest.golden if manifest else golden

    @property
    def digest(self) -> str:
        """The artifact's digest; ArtifactError for a draft."""
        if self.manifest is None:
            raise ArtifactError(f"{self.path}: not a complete artifact (no {MANIFEST})")
        return self.manifest.digest

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class Model(Artifact):
    """A Hugging Face directory, a directory with one GGUF file (or the file itself), or a remote model."""

    kind = "model"

    @property
    def format(self) -> str:
        """ "hf", "gguf" or "http"."""
        if self.ref.startswith(("http://", "https://")):
            return "http"
        return "gguf" if self._gguf_files() else "hf"

    def _gguf_files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path] if self.path.suffix == ".gguf" else []
        return sorted(self.path.glob("*.gguf"))

    @property
    def gguf_path(self) -> Path:
        """The only GGUF file; ArtifactError when there is none, or more than one."""
        files = self._gguf_files()
        if len(files) != 1:
            raise ArtifactError(f"{self.path}: expected one .gguf file, found {len(files)}")
        return files[0]


class Adapter(Artifact):
    """A peft directory; `about["base"]` is the digest of its base model."""

    kind = "adapter"


class Tokenizer(Artifact):
    """A Hugging Face tokenizer directory."""

    kind = "tokenizer"


class Dataset(Artifact):
    """Parquet shards (or external JSONL); `about["schema"]` is the row schema."""

    kind = "dataset"

    @property
    def schema(self) -> str:
        """Schema kind: chat, text, preference, tokens, qa, bfcl, or "unknown" for an external directory."""
        return str(self.about.get("schema", "unknown"))


class Index(Artifact):
    """A LanceDB directory."""

    kind = "index"


class Report(Artifact):
    """`report.json`, `report.md` and a self-contained `report.html`."""

    kind = "report"

    def read(self) -> dict[str, Any]:
        """Return the report's data. ArtifactError when it cannot be read."""
        file = self.path / "report.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{file}: cannot be read ({str(error).splitlines()[0]}); create the report again"
            ) from None
        if not isinstance(data, dict):
            raise ArtifactError(f"{file}: not a report; create it again")
        return data


KINDS: dict[str, type[Artifact]] = {c.kind: c for c in (Model, Adapter, Tokenizer, Dataset, Index, Report)}


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def list_files(path: Path) -> list[Path]:
    """Return all files of an artifact directory except its manifest, sorted by relative path."""
    if path.is_file():
        return [path]
    return sorted(
        p for p in path.rglob("*") if p.is_file() and p.relative_to(path).as_posix() not in (MANIFEST, ".complete.json")
    )


def hash_files(path: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Hash every file of a directory (or one file), except those with known digests."""
    root = path.parent if path.is_file() else path
    files = {p.relative_to(root).as_posix(): p for p in list_files(path)}
    return {
        name: (
            known[name]
            if known and name in known and known[name].bytes == p.stat().st_size
            else FileEntry(sha256=sha256_file(p), bytes=p.stat().st_size)
        )
        for name, p in files.items()
    }


def compute_key(
    stage: str,
    revision: int,
    config: Mapping[str, Any],
    seed: int,
    parents: Mapping[str, str],
    files: Mapping[str, str],
) -> str:
    """Return the digest of a step: of its stage, config, seed, parents' digests by role, and files that it reads."""
    content = [stage, revision, config, seed, parents, *([files] if files else [])]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def compute_artifact_digest(kind: str, key: str, files: dict[str, FileEntry]) -> str:
    """Return the artifact's digest over how it was derived and what it contains."""
    content = {name: entry.sha256 for name, entry in files.items()}
    return hashlib.sha256(canonical_json([kind, key, content]).encode()).hexdigest()


def load(path: Path, *, name: str = "", ref: str = "") -> Artifact:
    """Open a published artifact. ArtifactError when it is missing or its manifest is invalid."""
    path = Path(path)
    file = path / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or directory")
    try:
        data = file.read_bytes()
        manifest = Manifest.model_validate_json(data)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {MANIFEST}: not a complete llmworks artifact") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{file}: field {'.'.join(map(str, first['loc'])) or '(all)'}: {first['msg']}; the manifest was"
            " modified or has another version"
        ) from None
    if manifest.kind not in KINDS:
        raise ArtifactError(f"{file}: unknown artifact kind {manifest.kind!r}")
    artifact = KINDS[manifest.kind](path, manifest=manifest, name=name, ref=ref)
    artifact.manifest_digest = hashlib.sha256(data).hexdigest()
    return artifact


def check_base(adapter: Adapter, model: Model) -> bool:
    """Check an adapter's recorded base model; return False where none is recorded.

    ArtifactError when it was trained on another model.
    """
    base = adapter.about.get("base")
    if base and base != model.digest:
        raise ArtifactError(
            f"the adapter {adapter.name} was trained on the model {str(base)[:12]}, not on {model.name}"
            f" ({model.digest[:12]}); use it with its own model"
        )
    return bool(base)


def find_changed_files(artifact: Artifact) -> list[str]:
    """Return the files that do not match the manifest, one line each; also missing and extra ones."""
    assert artifact.manifest is not None
    problems: list[str] = []
    present = (
        {p.relative_to(artifact.path).as_posix(): p for p in list_files(artifact.path)}
        if artifact.path.is_dir()
        else {artifact.path.name: artifact.path}
    )
    for name, entry in artifact.manifest.files.items():
        if name not in present:
            problems.append(f"{name}: missing")
        elif present[name].stat().st_size != entry.bytes:
            problems.append(f"{name}: {present[name].stat().st_size} bytes, expected {entry.bytes}")
        elif sha256_file(present[name]) != entry.sha256:
            problems.append(f"{name}: modified (same size, different bytes)")
    problems += [f"{name}: not in the manifest" for name in sorted(set(present) - set(artifact.manifest.files))]
    if (
        compute_artifact_digest(artifact.manifest.kind, artifact.manifest.key, artifact.manifest.files)
        != artifact.manifest.digest
    ):
        problems.append(f"{MANIFEST}: digest does not match its contents")
    return problems


def fsync_path(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(draft: Path, manifest: Manifest) -> None:
    """Flush a draft's files, then write and flush its manifest; from then on it is complete.

    Files that a library made private (safetensors: 0600) get the permissions of a new file.
    """
    temporary = draft / (MANIFEST + ".tmp")
    temporary.touch()
    permissions = temporary.stat().st_mode
    paths: Iterable[Path] = (path for path in list_files(draft) if path != temporary)
    for path in paths:
        if not path.is_symlink() and path.stat().st_mode & permissions != permissions:
            path.chmod(path.stat().st_mode | permissions)
        fsync_path(path)
    temporary.write_text(manifest.model_dump_json(indent=1) + "\n")
    fsync_path(temporary)
    temporary.rename(draft / MANIFEST)
    for directory in [draft, *(p for p in draft.rglob("*") if p.is_dir())]:
        fsync_path(directory)


def move_into_place(draft: Path, target: Path) -> None:
    """Rename a sealed draft to its final path, or delete it when an equal artifact is already there."""
    if (target / MANIFEST).exists():
        shutil.rmtree(draft)
        return
    if target.exists():  # incomplete: it has no manifest
        shutil.rmtree(target)
    draft.rename(target)
    fsync_path(target.parent)
