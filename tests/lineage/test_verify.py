"""`verify` checks what lies in the directory that it is given, whatever the workspace names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmworks import Model, Session
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
