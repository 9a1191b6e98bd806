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
from llmworks.runtime.runner import Run


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "workspace-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_whole_is_read_and_the_rest_is_made_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = {j.name: j for j in Run(load_recipe(Path("old.yaml")), Workspace(Path("ws"))).plan()}
    assert {name for name, j in judged.items() if j.state == "up to date"} == {"chats", "train", "test", "overlap"}
    assert judged["tuned"].why == (
        "config.parallel was {'data': 'replicate', 'tensor': 1, 'pipeline': 1}, is {'data': 'replicate'}"
    )
    assert judged["small"].why.startswith("stage quantize.absmax revision 3 became quantize.rtn revision 1")
    assert main(["run", "old.yaml", "--workspace", "ws", "--quiet"]) == 0
    assert "2 steps made, 4 up to date" in capsys.readouterr().out


def test_old_artifacts_verify(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact steps of the same revision are derived again to the byte; of a stage that is gone that is said."""
    assert main(["verify", "old/overlap", "--workspace", "ws"]) == 0
    said = capsys.readouterr().out
    assert said.count("derived again") == 4, said
    assert main(["verify", "old/small", "--workspace", "ws"]) == 0
    assert "made by the stage quantize.absmax, which this version has not" in capsys.readouterr().out
