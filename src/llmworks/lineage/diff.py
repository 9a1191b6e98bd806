"""Diff two artifacts: stage, config fields, parents, files, metrics. Compares manifests only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmworks.core.artifact import Artifact

DiffRow = tuple[str, str, Any, Any]  # (section, field, left, right)


def diff(a: Artifact, b: Artifact) -> list[DiffRow]:
    """List all differences: provenance, config, parents, versions, files, then metrics."""
    left, right = a.manifest, b.manifest
    assert left is not None
    assert right is not None
    rows: list[DiffRow] = [
        ("made by", name, getattr(left, name), getattr(right, name))
        for name in ("kind", "stage", "revision", "code", "seed", "threads")
        if getattr(left, name) != getattr(right, name)
    ]
    rows += _diff_mapping("config", _flatten(left.config), _flatten(right.config))
    rows += _diff_mapping(
        "parent",
        {p.role: f"{p.name} {p.digest[:12]}" for p in left.parents},
        {p.role: f"{p.name} {p.digest[:12]}" for p in right.parents},
    )
    rows += _diff_mapping("version", left.versions, right.versions)
    rows += _diff_mapping("platform", left.platform, right.platform)
    rows += _diff_mapping(
        "file", {n: f.sha256[:12] for n, f in left.files.items()}, {n: f.sha256[:12] for n, f in right.files.items()}
    )
    rows += _diff_mapping("about", _flatten(left.about), _flatten(right.about))
    rows += _diff_mapping("metric", _flatten(left.metrics), _flatten(right.metrics))
    return rows


def _diff_mapping(section: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> list[DiffRow]:
    names = list(dict.fromkeys([*left, *right]))
    return [(section, n, left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out |= _flatten(item, f"{prefix}{key}.")
        else:
            out[prefix + key] = item
    return out
