"""One handler at the door: whatever happens, a user reads one line and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.core.text.yaml import load_yaml

ROWS = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


def run(folder: Path, *words: str | bytes, **options: Any) -> tuple[int, bytes, bytes]:
    environment = {**os.environ, "LLMWORKS_WORKSPACE": str(folder / "ws"), **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, "-m", "llmworks", *words], capture_output=True, cwd=folder, env=environment, **options
    )
    return done.returncode, done.stdout, done.stderr


ENCODINGS = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("env", ENCODINGS, ids=["latin-1", "ascii", "C"])
def test_terminals_that_are_not_utf8(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "sft.jsonl").write_text(ROWS)
    code, out, err = run(tmp_path, "data", "chat", "sft.jsonl", "--out", "o", env=env)
    assert (code, b"Traceback" in err) == (0, False), err
    assert b"\\u2713 data.chat" in out


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    name = b"\xff.jsonl"
    (tmp_path / os.fsdecode(name)).write_text(ROWS)
    code, out, err = run(tmp_path, "data", "chat", name, "--out", "o")
    assert code in (0, 2)
    assert b"Traceback" not in err
    assert code == 0 or (len(err.splitlines()) == 1 and not (tmp_path / "o").exists()), (out, err)
    code, _, err = run(tmp_path, "data", "chat", b"\xfe.jsonl", "--out", "o2")
    assert code == 2
    assert b"no such file" in err


def test_closed_streams(tmp_path: Path, pico: Path) -> None:
    closed = subprocess.run(
        f"{sys.executable} -m llmworks chat {pico} <&-",
        shell=True,
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert closed.returncode == 2
    assert b"standard input is closed" in closed.stderr
    assert b"Traceback" not in closed.stderr
    for command in ("stages >&-", "stages >&- 2>&-"):
        done = subprocess.run(f"{sys.executable} -m llmworks {command}", shell=True, cwd=tmp_path, check=False)
        assert done.returncode == 0


def test_a_vocabulary_below_the_alphabet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x5000))) * 2)
    place = ["--workspace", str(tmp_path / "ws"), "--quiet"]
    assert main(["data", "read", str(tmp_path / "a.txt"), "--out", str(tmp_path / "d"), *place]) == 0
    words = ["--set", "algorithm=unigram", "--set", "vocab_size=340", "--out", str(tmp_path / "t")]
    capsys.readouterr()
    assert main(["tokenize", "train", str(tmp_path / "d"), *words, *place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "512 different characters" in line
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("x"), 1)])
def test_an_interrupt_while_a_checkpoint_is_written(
    failure: BaseException, code: int, tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps it in its own exception; the exit code of an interrupt is 130, not that of a failed training."""
    from torch.distributed.checkpoint.api import CheckpointException

    def interrupted(*args: Any, **options: Any) -> None:
        raise CheckpointException("writing", {0: (failure, None)})  # type: ignore[dict-item]

    (tmp_path / "rows.jsonl").write_text(ROWS)
    place = ["--workspace", str(tmp_path / "ws"), "--quiet"]
    assert main(["data", "chat", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "d"), *place]) == 0
    monkeypatch.setattr("llmworks.train.loop.checkpoints.write", interrupted)
    words = ["train", "sft", str(pico), str(tmp_path / "d"), "--out", str(tmp_path / "t"), *place]
    sets = ("save_steps=1", "batch_size=1", "num_general_prompts=0")
    assert main([*words, *(word for one in sets for word in ("--set", one))]) == code
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["data", "chat", "rows.jsonl", "--config", "FILE", "--out", "o"],
            "format: messages\nturns: any\nformat: auto\n",
        ),
        (["merge", "FILE", "--out", "o"], "merge_method: linear\nmodels: []\nmerge_method: slerp\n"),
        (["tune", "sweep", "recipe.yaml", "FILE"], "metric: a.b\nfields: {}\nmetric: c.d\n"),
        (["import", "FILE"], "base_model: x\ndatasets: []\nbase_model: y\n"),
    ],
    ids=["config", "mergekit", "sweep", "axolotl"],
)
def test_duplicate_keys_are_named(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "recipe.yaml").write_text("name: x\nsteps: {}\n")
    (tmp_path / "file.yaml").write_text(text)
    assert main([word.replace("FILE", "file.yaml") for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "duplicate key" in line
    assert "file.yaml" in line


def test_merge_keys_and_nested_mappings_are_read() -> None:
    text = "a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\nc: [{x: 1}, {x: 2}]\n"
    assert load_yaml(text) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 2}]}


def test_stages_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stages", "train.sft", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "train.sft"
    assert set(found["inputs"]) == {"model", "data", "eval_data"}
    assert any(field["name"] == "num_train_epochs" for field in found["fields"])


def test_an_error_of_its_own_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(args: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("llmworks.commands.stages.handle", broken)
    assert main(["stages"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmworks: an error of llmworks itself in ")
    assert "ZeroDivisionError: two lines" in line
    assert "--debug" in line
    with pytest.raises(ZeroDivisionError):
        main(["stages", "--debug"])


def test_a_file_in_place_of_a_directory_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "file.csv").touch()
    for words in (["--out", "file.csv/x"], ["--workspace", "file.csv", "--out", "x"]):
        assert main(["data", "chat", "--data", "rows.jsonl", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "file.csv" in line
        assert line.endswith("a file is where a directory is needed; choose another path")


def test_selftest_of_a_training_whose_data_do_not_exist_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "selftest", str(recipe), "tuned"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model or the data of 'tuned' are not made yet; first `llmworks run" in line
