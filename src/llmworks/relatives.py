"""Find an artifact's relatives wherever they are, and derive an artifact again: what `tree` and `verify` need from stages and references.

The questions themselves (who descends from whom, what differs) are answered in `lineage/`.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from llmworks import assets
from llmworks.artifact import Artifact, FileEntry, Parent
from llmworks.assets.catalogue import CATALOGUE
from llmworks.execute import derive_again, machine, versions
from llmworks.lineage.family import Family, family_of
from llmworks.references import asset_files, find_digest, open_engine, resolve
from llmworks.stages import ResolvedStage
from llmworks.stages import resolve as resolve_stage
from llmworks.workspace import Workspace


def family_with(workspace: Workspace, *more: Artifact) -> Family:
    """The family of the workspace, what its artifacts came from as far as it is on this machine, and more artifacts."""
    every = [*workspace.artifacts(), *more]
    known = {a.digest for a in every}
    todo = [p for a in [*every, *workspace.names().values()] if a.manifest for p in a.manifest.parents]
    while todo:
        parent = todo.pop()
        if parent.digest in known:
            continue
        found = find_digest(parent.digest, workspace) or _from_outside(parent)
        if found is not None and found.manifest is not None:
            known.add(parent.digest)
            every.append(found)
            todo += found.manifest.parents
    return family_of(every, workspace.names())


def _from_outside(parent: Parent) -> Artifact | None:
    """A foreign parent, where its reference still leads to the same bytes without fetching."""
    scheme, _, rest = parent.ref.partition(":")
    found = None
    if scheme == "asset" and rest in CATALOGUE and assets.is_cached(assets.get(rest)):
        found = asset_files(rest, parent.name)
    elif scheme == "path" and Path(rest).exists():
        found = resolve(parent.ref, name=parent.name)
    return found if found is not None and found.digest == parent.digest else None


def derive(workspace: Workspace, family: Family, artifact: Artifact) -> dict[str, FileEntry] | str:
    """The files of an artifact made again in a temporary place; or a text that says why a comparison would say nothing."""
    m = artifact.manifest
    assert m is not None
    stage = resolve_stage(m.stage)
    if stage.stage.revision != m.revision:
        return f"made by revision {m.revision} of {m.stage}, this is revision {stage.stage.revision}"
    inputs = _parents(stage, family, artifact)
    if isinstance(inputs, str):
        return inputs
    temporary = Path(tempfile.mkdtemp(prefix=".verify-", dir=workspace.root if workspace.root.is_dir() else None))
    try:
        out, scratch = temporary / "out", temporary / "scratch"
        out.mkdir()
        scratch.mkdir()
        files = derive_again(stage, artifact, inputs, out, scratch, partial(open_engine, workspace=workspace))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if files != m.files:
        changed = {k: (m.versions[k], v) for k, v in versions().items() if k in m.versions and m.versions[k] != v and k != "llmworks"}
        if changed:
            return "other bytes, but made with " + ", ".join(f"{k} {old} (here {new})" for k, (old, new) in changed.items())
        if m.derivation == "exact-on-this-platform" and m.platform != machine():
            return f"other bytes, but made on {m.platform.get('processor')}"
    return files


def _parents(stage: ResolvedStage, family: Family, artifact: Artifact) -> dict[str, Any] | str:
    """The artifact's inputs by name, as its stage takes them; or which parent is not here."""
    assert artifact.manifest is not None
    inputs: dict[str, Any] = {}
    for parent in artifact.manifest.parents:
        node = family.nodes.get(parent.digest)
        found = node.artifact if node else None
        if found is None:
            return f"its parent {parent.name} ({parent.digest[:12]}) is not here"
        found.name = parent.name
        role, bracket, key = parent.role.partition("[")
        if not bracket:
            inputs[role] = found
        elif stage.inputs[role].shape == "list":
            inputs.setdefault(role, []).append(found)
        else:
            inputs.setdefault(role, {})[key.rstrip("]")] = found
    return inputs
