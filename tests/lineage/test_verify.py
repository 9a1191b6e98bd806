"""`verify` checks what lies in the directory that it is given, whatever the workspace names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmworks import ArtifactError, Model, Session
from llmworks.cli import main


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def write_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def swap_halves(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + data[len(data) // 2 :][::-1])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, pico: Path) -> tuple[Session, dict[str, Model]]:
    """A session with a named model of each kind of file."""
    session = Session(tmp_path_factory.mktemp("verify") / "workspace", quiet=True)
    made = session.make("model.new", kind=Model, tokenizer=pico, config={"hidden_size": 32, "num_hidden_layers": 1})
    lstm = session.make("model.recurrent", kind=Model, tokenizer=pico, config={"embedding_dim": 16, "rnn_type": "lstm"})
    small = session.make("quantize.gguf", kind=Model, model=pico, config={"type": "f16"})
    models = {"model.safetensors": made, "recurrent": lstm, "model.gguf": small}
    for name, model in models.items():
        session.workspace.bind("names", name.partition(".")[2] or name, model)
    return session, models


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_byte),
        ("model.safetensors", write_nan),
        ("recurrent", flip_byte),
        ("recurrent", write_nan),
        ("model.gguf", flip_byte),
        ("model.gguf", swap_halves),
    ],
)
def test_a_damaged_copy_of_a_named_artifact_is_found(
    originals: tuple[Session, dict[str, Model]],
    name: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session, models = originals
    copy = tmp_path / "copy"
    shutil.copytree(models[name].path, copy)
    workspace = str(session.workspace.root)
    assert main(["verify", str(copy), "--workspace", workspace]) == 0
    damage(copy / (name if name != "recurrent" else "model.safetensors"))
    capsys.readouterr()
    assert main(["verify", str(copy), "--workspace", workspace]) == 1
    assert f"DAMAGED: {copy}" in capsys.readouterr().out
    assert main(["verify", str(models[name].path), "--workspace", workspace]) == 0  # the original is as it was


RECIPE = """
name: scored
steps:
  questions: {use: "path:QUESTIONS"}
  base: {use: "path:MODEL"}
  score: {stage: evaluate, inputs: {model: base, data: questions}, config: {task: TASK}}
  again: {stage: evaluate, inputs: {model: base, data: questions}, config: {task: TASK, limit: 4}}
  compared: {stage: evaluate.compare, inputs: {before: score, after: score}}
  good: {gate: score, metric: score, at_least: 0}
"""
TASK = {
    "name": "letters",
    "kind": "choice",
    "question": "{{question}}",
    "choices": "{{choices}}",
    "answer": "{{answer}}",
    "metrics": ["acc"],
}


@pytest.fixture
def scored(tmp_path: Path, pico: Path) -> tuple[Path, str]:
    """A recipe with an evaluation, its child and a gate, and its workspace."""
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(json.dumps(TASK))
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace("QUESTIONS", str(tmp_path / "rows.jsonl")).replace("MODEL", str(pico))
    recipe.write_text(text.replace("TASK", str(tmp_path / "task.yaml")))
    assert main(["run", str(recipe), "--workspace", str(tmp_path / "ws"), "--quiet"]) == 0
    return recipe, str(tmp_path / "ws")


def edit_score(manifest: dict[str, Any]) -> None:
    manifest["metrics"]["score"] = 0.99


def edit_about(manifest: dict[str, Any]) -> None:
    manifest["about"]["task"] = "another"


def edit_time(manifest: dict[str, Any]) -> None:
    manifest["finished"] = "2000-01-01T00:00:00.000+00:00"


@pytest.mark.parametrize("edit", [edit_score, edit_about, edit_time])
def test_an_edited_manifest_breaks_it_and_its_children(
    scored: tuple[Path, str], edit: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workspace = scored
    for name in ("score", "compared"):
        assert main(["verify", f"scored/{name}", "--workspace", workspace]) == 0
    assert "unwitnessed" not in capsys.readouterr().out
    file = Path(workspace) / "scored" / "score" / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    for name in ("score", "compared"):
        assert main(["verify", f"scored/{name}", "--workspace", workspace]) == 1
        assert "manifest.json: changed after it was made" in capsys.readouterr().out
    assert main(["run", str(recipe), "--workspace", workspace]) != 0  # neither up to date nor a gate that holds
    assert "manifest.json was changed" in capsys.readouterr().err
    session = Session(workspace, quiet=True)
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed"):
        session.make("evaluate.compare", before=session.load("scored/score"), after=session.load("scored/again"))


@pytest.mark.parametrize("journal", [True, False])
def test_a_copy_is_held_against_what_the_workspace_knows(
    scored: tuple[Path, str], journal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the journal, or by the record of a child; a copy that nothing knows is called unwitnessed."""
    _, workspace = scored
    shutil.copytree((Path(workspace) / "scored" / "score").resolve(), tmp_path / "copy")
    if not journal:
        (Path(workspace) / "journal.jsonl").unlink()
    words = ["verify", str(tmp_path / "copy"), "--workspace"]
    assert main([*words, workspace]) == 0
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    edit_score(manifest)
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    assert main([*words, workspace]) == 1
    capsys.readouterr()
    assert main([*words, str(tmp_path / "empty")]) == 0
    assert "unwitnessed" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["config", "seed", "parents", "stage"])
def test_what_the_key_covers_cannot_be_edited(
    scored: tuple[Path, str], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even of an artifact that nothing knows: its digest covers them."""
    copy = tmp_path / "copy"
    shutil.copytree((Path(scored[1]) / "scored" / "again").resolve(), copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    other = {"config": {**manifest["config"], "limit": 3}, "seed": 7, "parents": manifest["parents"][:1]}
    manifest[field] = other.get(field, "evaluate.judge")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(copy), "--workspace", str(tmp_path / "empty")]) == 1
    assert "are not those of its key" in capsys.readouterr().out


def test_gates_are_in_the_journal_once(scored: tuple[Path, str]) -> None:
    recipe, workspace = scored
    assert main(["run", str(recipe), "--workspace", workspace, "--quiet"]) == 0
    lines = [json.loads(line) for line in (Path(workspace) / "journal.jsonl").read_text().splitlines()]
    (gate,) = [line for line in lines if "gate" in line]
    assert (gate["gate"], gate["state"]) == ("scored/good", "gate holds")
    assert gate["manifest"] in {line["manifest"] for line in lines if line.get("stage") == "evaluate"}
