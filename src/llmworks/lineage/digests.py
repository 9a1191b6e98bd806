"""Digests of files, cached by (device, inode, size, modification and change time), and checks of artifacts by them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

from llmworks.core.artifact import MANIFEST, Artifact, FileEntry, list_files, sha256_file
from llmworks.core.errors import ArtifactError
from llmworks.core.workspace import Workspace, cache_directory

MAX_CACHED_DIGESTS = 10_000  # of files: 1 MB of JSON, read for every reference


def hash_files_cached(path: Path) -> dict[str, FileEntry]:
    """Return digests of the files of a directory, or of one file; only new and changed ones are read."""
    known = _read_digests()
    root = path.parent if path.is_file() else path
    out: dict[str, FileEntry] = {}
    fresh: dict[str, str] = {}
    for file in list_files(path):
        identity = _identify(file)
        digest = known.get(identity) or fresh.setdefault(identity, sha256_file(file))
        out[file.relative_to(root).as_posix()] = FileEntry(sha256=digest, bytes=file.stat().st_size)
    if fresh:
        _save_digests({**known, **fresh})
    return out


def remember_digests(artifact: Artifact) -> None:
    """Cache the digests of an artifact that was just published, so that its files need not be read again."""
    assert artifact.manifest is not None
    fresh = {
        _identify(artifact.path / name): entry.sha256
        for name, entry in artifact.manifest.files.items()
        if (artifact.path / name).is_file()
    }
    _save_digests({**_read_digests(), **fresh})


def check_unchanged(artifact: Artifact) -> None:
    """Check that the files of a published artifact are those that its manifest records, and the manifest itself.

    Errors: ArtifactError that names the first file that was changed, added or removed.
    """
    manifest = artifact.manifest
    if manifest is None or not (artifact.path / MANIFEST).is_file():  # external files are hashed when they are resolved
        return
    witnesses = list_witnesses(artifact)
    if witnesses and artifact.manifest_digest not in witnesses:
        raise ArtifactError(f"{artifact.path}: {MANIFEST} was changed after the {artifact.kind} was made; restore it")
    present = hash_files_cached(artifact.path)
    names = sorted(set(present) | set(manifest.files))
    changed = [name for name in names if present.get(name) != manifest.files.get(name)]
    if not changed:
        return
    name = changed[0]
    what = "was removed" if name not in present else "was changed" if name in manifest.files else "was added"
    more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
    raise ArtifactError(
        f"{artifact.path}: {name} {what} after the {artifact.kind} was made{more}. Restore it, or remove the directory"
        f" to make it again; to use it as it is, copy it without {MANIFEST}"
    )


def list_witnesses(artifact: Artifact) -> set[str]:
    """Return the digests of its manifest that the artifact's workspace records; empty elsewhere.

    The journal records them, and so do the artifacts that were made from it, which are read where the journal has none.
    """
    store = artifact.path.resolve().parent
    if store.name != "store":
        return set()
    return Workspace(store.parent).list_witnesses(artifact.digest) or _list_children_witnesses(store, artifact.digest)


def _list_children_witnesses(store: Path, digest: str) -> set[str]:
    found: set[str] = set()
    for file in store.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: no witness
            text = file.read_text(encoding="utf-8")
            parents = json.loads(text)["parents"] if digest in text else []
            found |= {parent["manifest"] for parent in parents if parent["digest"] == digest and parent.get("manifest")}
    return found


def _identify(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _cache_file() -> Path:
    return cache_directory() / "digests.json"


def _read_digests() -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return known


def _save_digests(known: dict[str, str]) -> None:
    """Store the newest digests; without space or write permission they are computed again next time."""
    store = _cache_file()
    with contextlib.suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=store.parent, prefix=".digests-", delete=False) as stream:
            draft = Path(stream.name)
            try:
                stream.write(json.dumps(dict(list(known.items())[-MAX_CACHED_DIGESTS:])))
                stream.flush()
                draft.replace(store)
            finally:
                draft.unlink(missing_ok=True)
