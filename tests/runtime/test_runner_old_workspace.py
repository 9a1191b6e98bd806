"""A workspace of 0.1.0, as that version left it: what is whole is read, what was made otherwise is made again and says
why.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from llmworks.cli import main
from llmworks.core.workspace import Workspace
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.runner import RecipeRun


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "workspace-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = {
    "part:": "split:",
    "folds:": "n_splits:",
    "epochs:": "num_train_epochs:",
    "samples:": "num_sample_prompts:",
} | {
    "rank:": "r:",
    "group:": "group_size:",
}


def test_old_names_are_answered_with_new_ones(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "old.yaml", "--workspace", "ws"]) == 2
    said = capsys.readouterr().err
    for before, after in NAMES.items():
        assert f"unknown key {before[:-1]!r}, did you mean" in said
        assert f"{after[:-1]}'?" in said


def test_what_is_whole_is_read_and_the_rest_is_made_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("old.yaml").read_text()
    for before, after in NAMES.items():
        text = text.replace(before, after)
    Path("new.yaml").write_text(text.replace("name: new", "name: old"))
    judged = {j.name: j for j in RecipeRun(load_recipe(Path("new.yaml")), Workspace(Path("ws"))).plan()}
    assert judged["chats"].reason.startswith(
        "stage data.chat revision 5 became data.chat revision 8; config.repeated was"
    )
    assert judged["small"].reason.startswith("stage quantize.absmax revision 3 became quantize.rtn revision 2")
    assert main(["run", "new.yaml", "--workspace", "ws", "--quiet"]) == 0
    assert "6 steps run" in capsys.readouterr().out
    assert main(["run", "new.yaml", "--workspace", "ws", "--quiet"]) == 0
    assert "Everything is up to date." in capsys.readouterr().out


def test_old_artifacts_verify(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files and parents are checked; of a stage that has changed, or is gone, that is said."""
    assert main(["verify", "old/overlap", "--workspace", "ws"]) == 0
    said = capsys.readouterr().out
    assert said.count("not comparable: made by revision") == 4, said
    assert main(["verify", "old/small", "--workspace", "ws"]) == 0
    assert "made by the stage quantize.absmax, which this version does not have" in capsys.readouterr().out
