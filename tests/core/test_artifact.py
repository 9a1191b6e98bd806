"""Artifacts and workspaces: complete or absent, tampering named, names swapped atomically, nothing collected that is
needed.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmworks.core.artifact import (
    MANIFEST,
    Artifact,
    Manifest,
    Parent,
    compute_artifact_digest,
    find_changed_files,
    hash_files,
    load,
)
from llmworks.core.errors import ArtifactError, UserError
from llmworks.core.workspace import Workspace
from llmworks.lineage.diff import diff
from llmworks.lineage.drawing.formats import draw_svg, draw_text
from llmworks.lineage.family import build_family


def publish(
    workspace: Workspace,
    key: str,
    content: str,
    parents: tuple[Artifact, ...] = (),
    kind: str = "dataset",
    **config: object,
) -> Artifact:
    draft = workspace.draft(key)
    (draft / "sub").mkdir()
    (draft / "a.txt").write_text(content)
    (draft / "sub" / "b.txt").write_text("b")
    files = hash_files(draft)
    manifest = Manifest(
        kind=kind,
        digest=compute_artifact_digest(kind, key, files),
        key=key,
        stage="s",
        revision=1,
        derivation="exact",
        config=dict(config),
        files=files,
        parents=[
            Parent(role=f"in[{i}]", name=p.name, kind=p.kind, digest=p.digest, ref="") for i, p in enumerate(parents)
        ],
        finished=f"{time.time():.6f}",
    )  # type: ignore[call-arg]
    return workspace.publish(draft, manifest)


def test_published_artifact_is_found_and_whole(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    made = publish(workspace, "k" * 64, "x")
    assert made.path.name == f"dataset-{made.digest[:12]}"
    found = workspace.find("k" * 64)
    assert found is not None
    assert found.digest == made.digest
    assert find_changed_files(made) == []
    assert set(made.manifest.files) == {"a.txt", "sub/b.txt"}  # type: ignore[union-attr]


def test_a_draft_is_no_artifact(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    draft = workspace.draft("k" * 64)
    (draft / "a.txt").write_text("half")
    assert workspace.artifacts() == []
    with pytest.raises(ArtifactError, match="not a complete llmworks artifact"):
        load(draft)
    assert list(workspace.draft("k" * 64).iterdir()) == []  # what a killed run left is gone


def test_every_kind_of_tampering_is_named(tmp_path: Path) -> None:
    made = publish(Workspace(tmp_path), "k" * 64, "xyz")
    (made.path / "a.txt").write_text("xyZ")
    assert find_changed_files(made) == ["a.txt: modified (same size, different bytes)"]
    (made.path / "a.txt").write_text("x")
    assert find_changed_files(made) == ["a.txt: 1 bytes, expected 3"]
    (made.path / "a.txt").unlink()
    (made.path / "c.txt").write_text("new")
    assert find_changed_files(made) == ["a.txt: missing", "c.txt: not in the manifest"]


def test_a_manifest_that_was_changed_is_named(tmp_path: Path) -> None:
    made = publish(Workspace(tmp_path), "k" * 64, "x")
    file = made.path / MANIFEST
    good = file.read_text()
    file.write_text(good.replace('"a.txt"', '"z.txt"'))
    assert any(p.startswith(MANIFEST) for p in find_changed_files(load(made.path)))
    for broken in (good.replace('"kind"', '"knid"'), good[:50], ""):
        file.write_text(broken)
        with pytest.raises(ArtifactError, match=MANIFEST):
            load(made.path)


def test_digest_is_derivation_and_content(tmp_path: Path) -> None:
    one, two = publish(Workspace(tmp_path / "1"), "k" * 64, "x"), publish(Workspace(tmp_path / "2"), "k" * 64, "x")
    assert one.digest == two.digest
    assert publish(Workspace(tmp_path / "3"), "j" * 64, "x").digest != one.digest
    assert publish(Workspace(tmp_path / "4"), "k" * 64, "y").digest != one.digest


def test_lock_excludes_another_process_and_dies_with_it(tmp_path: Path) -> None:
    code = (
        f"import time\nfrom llmworks.core.workspace import Workspace\nwith Workspace('{tmp_path}').lock('k'):\n   "
        " print('held', flush=True)\n    time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    lock = tmp_path / "locks" / "k"
    with lock.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.wait()
    child.stdout.close()
    with Workspace(tmp_path).lock("k"):
        pass


def test_gc_waits_for_no_run(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.mark_in_use(), pytest.raises(UserError, match="a run is active"):
        workspace.collect()
    assert workspace.collect() == []


def test_a_sealed_draft_is_no_artifact_yet_and_a_broken_one_blocks_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    good, broken = publish(workspace, "a" * 64, "a"), publish(workspace, "b" * 64, "b")
    sealed = workspace.store / ".draft-cccccccccccc"
    shutil.copytree(good.path, sealed)
    (broken.path / MANIFEST).write_text("{")
    assert [a.digest for a in workspace.artifacts()] == [good.digest]


def test_gc_keeps_names_their_ancestors_and_outside_links(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    parent = publish(workspace, "p" * 64, "p")
    child = publish(workspace, "c" * 64, "c", (parent,))
    linked = publish(workspace, "l" * 64, "l")
    lost = publish(workspace, "x" * 64, "x")
    workspace.bind("r", "child", child)
    workspace.link_out(tmp_path / "out", linked)
    workspace.draft("d" * 64)
    workspace.scratch("s" * 64)
    assert {p.name for p, _ in workspace.collect(dry_run=True)} == {lost.path.name, ".draft-" + "d" * 12}
    workspace.collect()
    assert {a.digest for a in workspace.artifacts()} == {parent.digest, child.digest, linked.digest}
    assert (workspace.root / "scratch" / ("s" * 12)).exists()
    (tmp_path / "out").unlink()
    workspace.collect(scratch=True)
    assert {a.digest for a in workspace.artifacts()} == {parent.digest, child.digest}
    assert not (workspace.root / "scratch" / ("s" * 12)).exists()


def test_out_never_overwrites_what_is_not_ours(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="already exists"):
        workspace.link_out(tmp_path / "mine", publish(workspace, "k" * 64, "x"))


def test_family_tree_and_diff(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    a = publish(workspace, "a" * 64, "a", lr=1)
    b = publish(workspace, "b" * 64, "b", (a,), kind="model", lr=2)
    c = publish(workspace, "c" * 64, "c", (a, b), kind="report", lr=2)
    family = build_family([c, b, a], {"r/alpha": a, "r/beta": b})
    assert [n.digest for n in family.ancestors(c.digest)] == [a.digest, b.digest, c.digest]
    assert {n.digest for _, n in family.children(a.digest)} == {b.digest, c.digest}
    lines = draw_text(family).splitlines()
    assert next(line.split()[0].strip("└─├│") or line.split()[1] for line in lines) == "alpha"
    assert len(lines) == 3
    svg = draw_svg(family)
    assert svg.count("<rect") == 3
    assert svg.count("<path") == 3
    rows = diff(a, b)
    assert ("config", "lr", 1, 2) in rows
    assert ("made by", "kind", "dataset", "model") in rows
    assert diff(a, a) == []
