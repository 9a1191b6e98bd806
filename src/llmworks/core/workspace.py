"""A workspace: an immutable artifact store, names that point into it, scratch space and locks.

store/KIND-DIGEST12/      immutable artifacts
NAME/STEP -> ../store/..  names, swapped atomically
scratch/KEY12/            checkpoints for resuming a step
locks/KEY12               one flock per step
roots/ID -> OUT           `--out` links elsewhere that keep artifacts alive
journal.jsonl             digests of manifests that were published, and gates that were judged
tracking/TOOL             metrics in the formats of other tools (`--track`)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmworks.core.artifact import MANIFEST, Artifact, Manifest, load, move_into_place, seal
from llmworks.core.errors import ArtifactError, UserError

RESERVED = ("store", "scratch", "locks", "roots", "tracking", "journal.jsonl")


def default_workspace() -> Path:
    """Return `$LLMWORKS_WORKSPACE`, else `workspace` in the current directory."""
    return Path(os.environ.get("LLMWORKS_WORKSPACE") or "workspace")


def cache_directory() -> Path:
    """Return the cache for fetched assets and converted models: `$LLMWORKS_CACHE`, else `~/.cache/llmworks`."""
    return Path(os.environ.get("LLMWORKS_CACHE") or Path.home() / ".cache" / "llmworks")


class Workspace:
    """The directory tree described above. Safe for several processes."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    @property
    def store(self) -> Path:
        """Directory of immutable artifacts."""
        return self.root / "store"

    def artifacts(self) -> list[Artifact]:
        """Return every complete artifact in the store, oldest first."""
        found: list[Artifact] = []
        for path in self.store.glob(f"[!.]*/{MANIFEST}"):
            with contextlib.suppress(ArtifactError):  # skip artifacts that are broken or were removed meanwhile
                found.append(load(path.parent))
        return sorted(found, key=lambda a: (a.manifest.finished if a.manifest else "", a.path.name))

    def find(self, key: str) -> Artifact | None:
        """Return the newest artifact with this step key."""
        for artifact in reversed(self.artifacts()):
            if artifact.manifest is not None and artifact.manifest.key == key:
                return artifact
        return None

    def find_digest(self, digest: str) -> Artifact | None:
        """Return the artifact with this digest, from the store or behind a name."""
        for artifact in [*self.artifacts(), *self.list_named_artifacts().values()]:
            if artifact.digest == digest:
                return artifact
        return None

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the step's lock, waiting for it. The kernel releases it when the process dies."""
        directory = self.root / "locks"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / key[:12]).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def mark_in_use(self) -> Iterator[None]:
        """Block `collect` while a run reads and writes artifacts here."""
        directory = self.root / "locks"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "in-use").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def draft(self, key: str) -> Path:
        """Create an empty draft directory; drafts that a killed run left for this key are removed first."""
        self.store.mkdir(parents=True, exist_ok=True)
        for old in self.store.glob(f".draft-{key[:12]}*"):
            shutil.rmtree(old)
        path = self.store / f".draft-{key[:12]}"
        path.mkdir()
        return path

    def scratch(self, key: str) -> Path:
        """Return the step's scratch directory, created if missing."""
        path = self.scratch_path(key)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def scratch_path(self, key: str) -> Path:
        """Return the path of the step's scratch directory, which may not exist."""
        return self.root / "scratch" / key[:12]

    def remove_scratch(self, key: str) -> None:
        """Remove the scratch directory of a finished step."""
        shutil.rmtree(self.scratch_path(key), ignore_errors=True)

    def publish(self, draft: Path, manifest: Manifest) -> Artifact:
        """Seal a draft and move it into the store under its kind and digest."""
        seal(draft, manifest)
        target = self.store / f"{manifest.kind}-{manifest.digest[:12]}"
        self.record({"digest": manifest.digest, "manifest": load(draft).manifest_digest, "stage": manifest.stage})
        move_into_place(draft, target)
        return load(target)

    @property
    def journal(self) -> Path:
        """The file of what was published and which gates were passed, one JSON object a line."""
        return self.root / "journal.jsonl"

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the journal, in one write, unless it is there already."""
        text = json.dumps(entry, ensure_ascii=False)
        if self.journal.exists() and text[:-1].encode() in self.journal.read_bytes():
            return
        line = json.dumps({**entry, "at": datetime.now(UTC).isoformat(timespec="seconds")}, ensure_ascii=False) + "\n"
        with self.journal.open("ab", buffering=0) as stream:
            stream.write(line.encode())

    def list_witnesses(self, digest: str) -> set[str]:
        """Return the digests of manifests that the journal records for an artifact."""
        if not self.journal.exists():
            return set()
        found = set()
        for line in self.journal.read_bytes().splitlines():
            if digest.encode() in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a full disk cut
                    entry = json.loads(line)
                    found |= {entry["manifest"]} if entry["digest"] == digest else set()
        return found

    def bind(self, group: str, name: str, artifact: Artifact) -> Path:
        """Point `group/name` to an artifact, atomically."""
        link = self.root / group / name
        link.parent.mkdir(parents=True, exist_ok=True)
        target = artifact.path.absolute()
        replace_link(link, Path(os.path.relpath(target, link.parent)) if target.is_relative_to(self.root) else target)
        return link

    def link_out(self, out: Path, artifact: Artifact) -> Artifact | None:
        """Point a path outside the workspace to an artifact, and register it as a garbage collection root.

        Return the artifact it pointed to before.
        """
        out = out.absolute()
        check_out(out)
        before = load(out.resolve()) if out.exists() else None
        out.parent.mkdir(parents=True, exist_ok=True)
        roots = self.root / "roots"
        roots.mkdir(parents=True, exist_ok=True)
        replace_link(roots / hashlib.sha256(str(out).encode()).hexdigest()[:12], out)
        replace_link(out, artifact.path)
        return before

    def list_named_artifacts(self) -> dict[str, Artifact]:
        """Return every name (`group/step`) with its artifact; dangling names are omitted."""
        found: dict[str, Artifact] = {}
        for link in sorted(self.root.glob("*/*")):
            if link.parent.name in RESERVED or not link.is_symlink():
                continue
            with contextlib.suppress(ArtifactError):
                found[f"{link.parent.name}/{link.name}"] = load(link.resolve(), name=link.name)
        return found

    def out_links(self) -> dict[str, Artifact]:
        """Return the artifacts behind `--out` links by link name; missing or replaced links are omitted."""
        found: dict[str, Artifact] = {}
        for link in sorted((self.root / "roots").glob("*")):
            out = link.readlink() if link.is_symlink() else link
            if out.is_symlink() and out.resolve().parent == (self.root / "store").resolve():
                with contextlib.suppress(ArtifactError):
                    found[out.name] = load(out.resolve(), name=out.name)
        return found

    def collect(self, *, scratch: bool = False, dry_run: bool = False) -> list[tuple[Path, int]]:
        """Remove artifacts that are neither named nor ancestors of a named one.

        With `scratch`, also remove checkpoints of interrupted steps. Return the removed paths and their bytes.
        UserError while a run is active here.
        """
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with (self.root / "locks" / "in-use").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.root}: a run is active in this workspace; run gc when it has finished"
                ) from None
            return self._collect(scratch, dry_run)

    def _collect(self, scratch: bool, dry_run: bool) -> list[tuple[Path, int]]:
        artifacts = {a.digest: a for a in self.artifacts()}
        alive: set[str] = set()
        todo = [a.digest for a in self.list_named_artifacts().values()]
        for root in (self.root / "roots").glob("*"):
            target = root.resolve()
            if target.parent == self.store.resolve() and (target / MANIFEST).exists():
                todo.append(load(target).digest)
            elif not dry_run:
                root.unlink()
        while todo:
            digest = todo.pop()
            if digest in alive:
                continue
            alive.add(digest)
            artifact = artifacts.get(digest)
            if artifact is not None and artifact.manifest is not None:
                todo += [parent.digest for parent in artifact.manifest.parents]
        removed = [(a.path, get_size(a.path)) for digest, a in artifacts.items() if digest not in alive]
        leftovers = [*self.store.glob(".draft-*"), *((self.root / "scratch").glob("*") if scratch else ())]
        removed += [(path, get_size(path)) for path in leftovers]
        if not dry_run:
            for path, _ in removed:
                doomed = path.with_name(f".draft-gone-{path.name.removeprefix('.')}")
                path.rename(doomed)  # not an artifact from here on, even if the removal is interrupted
                shutil.rmtree(doomed, ignore_errors=True)
        return removed


def check_out(out: Path) -> None:
    """Raise UserError when `--out` exists and is not a link to a published artifact."""
    ours = out.is_symlink() and (
        not out.exists() or (out.resolve().parent.name == "store" and (out.resolve() / MANIFEST).exists())
    )
    if (out.exists() or out.is_symlink()) and not ours:
        raise UserError(f"{out}: already exists and is not an llmworks result; choose another --out")


def replace_link(link: Path, target: Path) -> None:
    """Create or replace a symbolic link atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


def get_size(path: Path) -> int:
    """Return the bytes of a file or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
