"""Collect an artifact's relatives from workspace, machine and references, and reproduce artifacts: the part of `tree`
and `verify` that needs stages and references.

The graph queries themselves (ancestry, differences) are in `lineage/`.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmworks import assets
from llmworks.assets.catalog import CATALOG
from llmworks.core.artifact import Adapter, Artifact, FileEntry, Model, Parent, Report
from llmworks.core.machine import describe_machine
from llmworks.core.workspace import Workspace
from llmworks.lineage.claims.parents import list_claims, read_license
from llmworks.lineage.family import ExtraParent, Family, build_family
from llmworks.runtime.execute import get_versions, rederive
from llmworks.runtime.references import find_digest, get_asset_files, resolve_reference
from llmworks.runtime.resolve import ResolvedStage
from llmworks.runtime.resolve import resolve_stage as resolve_stage
from llmworks.runtime.session import Session
from llmworks.runtime.stages import get_stages


def build_workspace_family(workspace: Workspace, *more: Artifact) -> Family:
    """Build the lineage graph of the workspace, of ancestors found on this machine, and of more artifacts; for external
    models also parents claimed by their files or inferred from weights.
    """
    every = [*workspace.artifacts(), *more]
    known = {a.digest for a in every}
    todo = [p for a in [*every, *workspace.list_named_artifacts().values()] if a.manifest for p in a.manifest.parents]
    while todo:
        parent = todo.pop()
        if parent.digest in known:
            continue
        found = find_digest(parent.digest, workspace) or _resolve_external_parent(parent)
        if found is not None and found.manifest is not None:
            known.add(parent.digest)
            every.append(found)
            todo += found.manifest.parents
    return build_family(
        every,
        {**workspace.out_links(), **workspace.list_named_artifacts()},
        [*_list_inferred_parents(every), *_list_claimed_parents(every)],
    )


def _list_inferred_parents(artifacts: Sequence[Artifact]) -> Iterator[ExtraParent]:
    """Yield parents found by `merge.find_parents`, for external models."""
    known = {artifact.digest: artifact for artifact in artifacts}
    for artifact in artifacts:
        if (
            isinstance(artifact, Report)
            and artifact.manifest is not None
            and artifact.manifest.stage == "merge.find_parents"
        ):
            data = artifact.read()
            child = known.get(str(data.get("child", "")))
            for parent in (
                data.get("parents", [])
                if child is not None and child.manifest is not None and not child.manifest.parents
                else []
            ):
                share = f" {parent['share']:.2f}" if data.get("relation") == "merged" else ""
                yield ExtraParent(
                    str(data["child"]),
                    str(parent["digest"]),
                    str(parent["name"]),
                    f"by its weights: {data.get('relation')}{share}",
                )


def _list_claimed_parents(artifacts: Sequence[Artifact]) -> Iterator[ExtraParent]:
    """Yield parents named in external models' files."""
    known = {
        ref.removeprefix("hf:"): artifact.digest
        for artifact in artifacts
        for ref in (artifact.ref, artifact.name)
        if ref and isinstance(artifact, (Model, Adapter))
    }
    for artifact in artifacts:
        if (
            not isinstance(artifact, (Model, Adapter))
            or artifact.manifest is None
            or artifact.manifest.stage
            or not artifact.path.exists()
            or artifact.about.get("format") == "http"
        ):
            continue
        for claim in list_claims(artifact.path):
            named = claim.name.removeprefix("hf:")
            yield ExtraParent(
                artifact.digest,
                known.get(named, f"claimed:{named}"),
                named,
                f"{claim.file} says: {claim.relation}",
                claim.name,
            )


def collect_licenses(family: Family) -> dict[str, str]:
    """Collect stated licenses of models and adapters by digest: from the catalogue, model cards or GGUF metadata."""
    found: dict[str, str] = {}
    for node in family.nodes.values():
        if node.kind in ("model", "adapter") and node.artifact is not None:
            asset = (
                node.artifact.ref.removeprefix("asset:")
                if node.artifact.ref.startswith("asset:")
                else str(node.artifact.about.get("asset", ""))
            )
            license_id = (
                CATALOG[asset].license.lower()
                if asset in CATALOG
                else read_license(node.artifact.path)
                if node.artifact.path.exists()
                else ""
            )
            if license_id:
                found[node.digest] = license_id
    return found


def _resolve_external_parent(parent: Parent) -> Artifact | None:
    """Resolve an external parent without downloading, where its reference still gives the same bytes."""
    scheme, _, rest = parent.ref.partition(":")
    found = None
    if scheme == "asset" and rest in CATALOG and assets.is_cached(assets.get_asset(rest)):
        found = get_asset_files(rest, parent.name)
    elif scheme == "path" and Path(rest).exists():
        found = resolve_reference(parent.ref, name=parent.name)
    return found if found is not None and found.digest == parent.digest else None


def reproduce(session: Session, family: Family, artifact: Artifact) -> dict[str, FileEntry] | str:
    """Reproduce an artifact in a temporary directory; return its files, or the reason why they cannot be compared."""
    m = artifact.manifest
    assert m is not None
    if m.stage not in get_stages():
        return f"made by the stage {m.stage}, which this version does not have"
    stage = resolve_stage(m.stage)
    if stage.stage.revision != m.revision:
        return f"made by revision {m.revision} of {m.stage}, but this version has revision {stage.stage.revision}"
    inputs = _resolve_inputs(stage, family, artifact)
    if isinstance(inputs, str):
        return inputs
    root = session.workspace.root
    temporary = Path(tempfile.mkdtemp(prefix=".verify-", dir=root if root.is_dir() else None))
    try:
        out, scratch = temporary / "out", temporary / "scratch"
        out.mkdir()
        scratch.mkdir()
        files = rederive(stage, artifact, inputs, out, scratch, session.open_engine)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if files != m.files:
        changed = {
            k: (m.versions[k], v)
            for k, v in get_versions().items()
            if k in m.versions and m.versions[k] != v and k != "llmworks"
        }
        if changed:
            return "different bytes, but made with " + ", ".join(
                f"{k} {old} (here {new})" for k, (old, new) in changed.items()
            )
        if m.derivation == "exact-on-this-platform" and m.platform != describe_machine():
            return f"different bytes, but made on {m.platform.get('processor')}"
    return files


def _resolve_inputs(stage: ResolvedStage, family: Family, artifact: Artifact) -> dict[str, Any] | str:
    """Return the artifact's inputs by name, as its stage takes them; or the missing parent as a message."""
    assert artifact.manifest is not None
    inputs: dict[str, Any] = {}
    for parent in artifact.manifest.parents:
        node = family.nodes.get(parent.digest)
        found = node.artifact if node else None
        if found is None:
            return f"its parent {parent.name} ({parent.digest[:12]}) is missing"
        found = copy.copy(found)  # restore its name and ref: model cards name models, and licenses come from references
        found.name, found.ref = parent.name, parent.ref
        role, bracket, key = parent.role.partition("[")
        if not bracket:
            inputs[role] = found
        elif stage.inputs[role].shape == "list":
            inputs.setdefault(role, []).append(found)
        else:
            inputs.setdefault(role, {})[key.rstrip("]")] = found
    return inputs
