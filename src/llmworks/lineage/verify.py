"""Verify an artifact and its ancestors: check file digests, and reproduce exact edges and compare byte for byte.

How to reproduce an artifact is passed in, because running stages belongs to a higher layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from llmworks.core.artifact import MANIFEST, Artifact, FileEntry, Manifest, find_changed_files
from llmworks.lineage.digests import list_witnesses
from llmworks.lineage.family import Family, LineageNode

# its layout changes with versions; its figures and tables are in the JSON and Markdown beside it
REPORT_PAGE = "report/report.html"
Verdict = Literal[
    "derived again, same bytes",
    "declared",
    "external",
    "not here",
    "not comparable",
    "files unchanged",
    "DAMAGED",
    "DIFFERS",
]
# Reproduce an artifact: return the files of the result, or why they cannot be compared.
Derive = Callable[[Artifact], dict[str, FileEntry] | str]


@dataclass(frozen=True)
class VerificationResult:
    """Verification result of one node."""

    node: LineageNode
    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether verification passed."""
        return self.verdict not in ("DAMAGED", "DIFFERS")


def verify(
    family: Family,
    digest: str,
    derive: Derive,
    compute_key: Callable[[Manifest], str],
    list_recorded: Callable[[str], set[str]] = lambda digest: set(),
) -> list[VerificationResult]:
    """Verify the node and all its ancestors, parents first.

    A node with damaged parents is not reproduced from them. `compute_key`: the step key of a manifest's stage, config,
    seed and parents, or "" where they do not determine it. `list_recorded`: digests of the manifests that a workspace's
    journal records for an artifact.
    """
    findings: list[VerificationResult] = []
    damaged: set[str] = set()
    for node in family.ancestors(digest):
        finding = _verify_node(
            node, damaged, derive, compute_key, _list_witnesses(family, node) | list_recorded(node.digest)
        )
        if not finding.ok:
            damaged.add(node.digest)
        findings.append(finding)
    return findings


def _list_witnesses(family: Family, node: LineageNode) -> set[str]:
    """Return the digests of the node's manifest that the workspace's journal and its children record."""
    found = list_witnesses(node.artifact) if node.artifact is not None else set()
    for _, child in family.children(node.digest):
        if child.artifact is not None and child.artifact.manifest is not None:
            found |= {p.manifest for p in child.artifact.manifest.parents if p.digest == node.digest and p.manifest}
    return found


def _find_manifest_problems(
    artifact: Artifact, compute_key: Callable[[Manifest], str], witnesses: set[str]
) -> list[str]:
    manifest, problems = artifact.manifest, []
    assert manifest is not None
    if witnesses and artifact.manifest_digest not in witnesses:
        problems.append(f"{MANIFEST}: changed after it was made, by the record of its workspace or of its children")
    key = compute_key(manifest) if manifest.stage else ""
    if key and key != manifest.key:
        problems.append(f"{MANIFEST}: its stage, config, seed or parents are not those of its key")
    return problems


def _verify_node(
    node: LineageNode,
    damaged: set[str],
    derive: Derive,
    compute_key: Callable[[Manifest], str],
    witnesses: set[str],
) -> VerificationResult:
    finding = _verify_files(node, damaged, derive, compute_key, witnesses)
    if finding.ok and node.stage and finding.verdict != "not here" and not witnesses:
        return replace(finding, detail=f"{finding.detail}; unwitnessed: its manifest is recorded nowhere else")
    return finding


def _verify_files(
    node: LineageNode,
    damaged: set[str],
    derive: Derive,
    compute_key: Callable[[Manifest], str],
    witnesses: set[str],
) -> VerificationResult:
    artifact = node.artifact
    if artifact is None or artifact.manifest is None:
        return VerificationResult(node, "not here", "known by digest only")
    if artifact.ref.startswith(("http://", "https://")):
        return VerificationResult(node, "declared", "served remotely, no files to check")
    problems = find_changed_files(artifact) + _find_manifest_problems(artifact, compute_key, witnesses)
    if problems:
        return VerificationResult(node, "DAMAGED", f"{artifact.path}: " + "; ".join(problems))
    if not node.stage:
        return VerificationResult(node, "external", "files unchanged")
    if node.derivation == "declared":
        return VerificationResult(node, "declared", "files unchanged; this stage is not reproducible")
    if any(parent in damaged for _, parent in node.parents):
        return VerificationResult(node, "files unchanged", "not reproduced, because a parent is damaged")
    derived = derive(artifact)
    if isinstance(derived, str):
        return VerificationResult(node, "not comparable", derived)
    recorded = artifact.manifest.files
    different = [name for name in sorted(set(derived) | set(recorded)) if derived.get(name) != recorded.get(name)]
    if different == [REPORT_PAGE] and node.kind != "report":
        return VerificationResult(
            node,
            "derived again, same bytes",
            f"{len(recorded) - 1} files; {REPORT_PAGE} has the same figures (report.json), but another layout",
        )
    if different:
        return VerificationResult(node, "DIFFERS", f"reproduced with different bytes in: {', '.join(different)}")
    return VerificationResult(node, "derived again, same bytes", f"{len(recorded)} files")
