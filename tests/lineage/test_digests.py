"""Steps and engines refuse artifacts whose files were changed after they were made, before anything is computed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmworks import ArtifactError, Dataset, Message, Model, Request, Sampling, Session
from llmworks.cli import main
from llmworks.lineage import digests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of digests of the test's own."""
    monkeypatch.setattr(digests, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def made(tmp_path: Path, pico: Path, cache: Path) -> tuple[Session, Model, Dataset]:
    """A session, and a model and a dataset that it made."""
    session = Session(tmp_path / "workspace", quiet=True)
    model = session.make("model.new", kind=Model, tokenizer=pico, config={"hidden_size": 32, "num_hidden_layers": 1})
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n' * 40)
    return session, model, session.make("data.read", kind=Dataset, data=tmp_path / "texts.jsonl")


def negate(model: Model) -> None:
    file = model.path / "model.safetensors"
    tensors = {name: -tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def keep_the_time(model: Model) -> None:
    """Another byte in place, with size and modification time as before."""
    file = model.path / "model.safetensors"
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_target(model: Model) -> None:
    """The file becomes a symlink to other weights."""
    file = model.path / "model.safetensors"
    other = model.path.parent.parent / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, other, metadata={"format": "pt"})
    file.unlink()
    file.symlink_to(other)


def add_weights(model: Model) -> None:
    shutil.copy(model.path / "model.safetensors", model.path / "more.safetensors")


def remove_tokenizer(model: Model) -> None:
    (model.path / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [negate, keep_the_time, replace_target, add_weights, remove_tokenizer])
def test_a_changed_model_is_refused_by_every_use(
    made: tuple[Session, Model, Dataset], damage: Callable[[Model], None], tmp_path: Path
) -> None:
    session, model, data = made
    config: dict[str, Any] = {"type": "f16"}
    session.make("quantize.gguf", model=model, config=config)
    damage(model)
    uses: list[Callable[[], object]] = [
        lambda: session.make("quantize.gguf", model=model, config=config),  # else: up to date
        lambda: session.make("quantize.rtn", model=model, config={"eval_samples": 0}),
        lambda: session.make("data.pack", model=model, data=data, config={"max_length": 64}),
        lambda: session.open_engine(model),
        lambda: session.make("model.new", tokenizer=model.path, config={"hidden_size": 32}),
        lambda: session.make(  # the result of its own step
            "model.new",
            tokenizer=session.load(model.manifest.parents[0].ref),
            config={"hidden_size": 32, "num_hidden_layers": 1},
        ),
    ]
    for use in uses:
        with pytest.raises(ArtifactError, match=r"(was changed|was added|was removed) after the model was made"):
            use()
    assert main(["verify", str(model.path), "--workspace", str(session.workspace.root)]) == 1


def test_a_changed_figure_is_refused_where_only_a_child_records_it(made: tuple[Session, Model, Dataset]) -> None:
    session, model, _ = made
    session.make("quantize.gguf", model=model, config={"type": "f16"})
    journal, manifest = session.workspace.journal, model.path / "manifest.json"
    journal.write_text("".join(x for x in journal.read_text().splitlines(True) if model.digest not in x))
    digests.check_unchanged(session.load(model.path))  # the child's record is that of the manifest
    text = manifest.read_text()
    manifest.write_text(text.replace('"parameters": ', '"parameters": 1', 1))
    assert manifest.read_text() != text
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after the model was made"):
        session.make("quantize.rtn", model=session.load(model.path), config={"eval_samples": 0})


def test_files_that_a_library_made_private_get_usual_permissions(made: tuple[Session, Model, Dataset]) -> None:
    modes = {path.stat().st_mode & 0o777 for path in made[1].path.rglob("*") if path.is_file()}
    assert modes == {(made[1].path / "manifest.json").stat().st_mode & 0o777}


def test_a_copy_without_a_manifest_is_used_as_it_is(made: tuple[Session, Model, Dataset], tmp_path: Path) -> None:
    session, model, _ = made
    negate(model)
    shutil.copytree(model.path, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    engine = session.open_engine(tmp_path / "copy")
    engine.generate([Request((Message("user", "a"),), sampling=Sampling(max_tokens=1))])
    engine.close()


def test_files_are_read_once(
    made: tuple[Session, Model, Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Published files are known already; touched ones are read again and are the same."""
    model = made[1]
    read: list[Path] = []
    real = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda file: (read.append(file), real(file))[1])
    digests.check_unchanged(model)
    assert read == []
    os.utime(model.path / "model.safetensors")
    digests.check_unchanged(model)
    digests.check_unchanged(model)
    assert read == [model.path / "model.safetensors"]


def test_a_plan_refuses_a_changed_result(tmp_path: Path, pico: Path, cache: Path, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"name: r\nsteps:\n  base: {{use: 'path:{pico}'}}\n"
        "  small: {stage: quantize.gguf, inputs: {model: base}, config: {type: f16}}\n"
    )
    words = [str(tmp_path / "recipe.yaml"), "--workspace", str(tmp_path / "ws")]
    assert main(["run", *words]) == 0
    assert main(["plan", *words]) == 0
    (file,) = (tmp_path / "ws" / "r" / "small").resolve().glob("*.gguf")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert main(["plan", *words]) == 2
    assert "was changed after the model was made" in capsys.readouterr().err
