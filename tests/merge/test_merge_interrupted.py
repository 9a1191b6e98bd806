"""Merges that are killed, or whose notes are broken: what is whole is kept, and the result is that of a merge that
nothing happened to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmworks.core.artifact import Artifact, Model
from llmworks.core.context import Context
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.execute import run as runs
from llmworks.merge.merge import merge
from llmworks.merge.plan.config import MergeConfig
from llmworks.model.io.safetensors_io import ShardWriter
from llmworks.runtime.session import load
from tests.conftest import make_pico
from tests.oracles.merge_models import save
from tests.oracles.merges import vectors

TIES: dict[str, Any] = {**vectors("ties", density=0.5), "max_shard_size": 1_000_000}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, so that changes are tied at a threshold."""
    place = tmp_path_factory.mktemp("halves")
    for name in ("base", "a", "b", "c"):
        save(place / name, name, kind="BF16")
    return place


def attempt(given: dict[str, Any], family: Path, place: Path, *, small: bool = True) -> Model:
    """The stage with a scratch directory that outlives it, in files of 3,000 bytes."""
    config = MergeConfig.model_validate(given)
    config = config.model_copy(update={"max_shard_size": 3000}) if small else config
    found: dict[str, Artifact] = {name: load(str(family / name)) for name in config.model_names()}
    out = place / "out"
    for old in out.glob("*") if out.exists() else ():
        old.unlink()
    for folder in (out, place / "scratch"):
        folder.mkdir(parents=True, exist_ok=True)
    made: Any = merge(
        config, found, Context(out, place / "scratch", 0, Progress(quiet=True), ReportBuilder(), lambda _: None)
    )  # type: ignore[arg-type, return-value]
    assert isinstance(made, Model)
    return made


def test_what_was_counted_is_not_forgotten(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes that are tied in files which were whole before the kill are told by the run that goes on."""
    straight = attempt(TIES, family, tmp_path / "straight")
    assert straight.metrics["threshold_ties"] > 0
    whole, opened = ShardWriter.__init__, 0

    def dies(self: ShardWriter, *args: Any) -> None:
        nonlocal opened
        opened += 1
        if opened == 4:
            raise KeyboardInterrupt
        whole(self, *args)

    monkeypatch.setattr(ShardWriter, "__init__", dies)
    with pytest.raises(KeyboardInterrupt):
        attempt(TIES, family, tmp_path / "killed")
    monkeypatch.setattr(ShardWriter, "__init__", whole)
    again = attempt(TIES, family, tmp_path / "killed")
    assert again.metrics == straight.metrics


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{",
        "[]",
        '{"files": {"model-00001-of-00004.safetensors": {}}, "notes": {}}',
        '{"files": 3, "notes": {}}',
        '{"files": {}, "notes": {"tied": "x"}}',
    ],
)
def test_a_broken_note_is_none(note: str, family: Path, tmp_path: Path) -> None:
    straight = attempt(TIES, family, tmp_path / "straight")
    shards = tmp_path / "noted" / "scratch" / "shards"
    shards.mkdir(parents=True)
    (shards / "done.json").write_text(note)
    again = attempt(TIES, family, tmp_path / "noted")
    assert again.metrics == straight.metrics
    assert json.loads((shards / "done.json").read_text())["files"]


def test_a_kill_after_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the result's logits are recorded: no file is written again."""
    for seed, name in enumerate("ab"):
        make_pico(tmp_path / name, seed=seed)
    given = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"],
        "max_shard_size": 1_000_000,
    }
    recorded = runs.make_logits_function

    def killed(_: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "make_logits_function", killed)
    with pytest.raises(KeyboardInterrupt):
        attempt(given, tmp_path, tmp_path / "m", small=False)
    kept = sorted((tmp_path / "m" / "scratch" / "shards").glob("*.safetensors"))
    assert kept
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in kept}
    monkeypatch.setattr(runs, "make_logits_function", recorded)
    made = attempt(given, tmp_path, tmp_path / "m", small=False)
    assert {name: (made.path / name).stat().st_ino for name in before} == {
        name: ino for name, (ino, _) in before.items()
    }
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    found = {name: tensor for file in before for name, tensor in load_file(made.path / file).items()}
    assert all(torch.allclose(found[name], (one[name] + other[name]) / 2, atol=1e-6) for name in one)
