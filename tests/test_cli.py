"""Bad input ends in one line that says what, where and what to do, with exit code 2; nothing is half written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "did you mean 'run'"),
        (["data", "caht", "--out", "x"], "did you mean 'data chat'"),
        (["sft"], "unknown command 'sft', did you mean 'train sft'?"),
        (["--verison"], "unknown command '--verison', did you mean '--version'?"),
        (["tune", "sweeep"], "did you mean 'tune sweep'?"),
        (["dat"], "unknown command 'dat', did you mean 'data'?"),
        (["run"], "recipe"),
        (["run", "none.yaml"], "no such recipe file"),
        (["show", "nothing"], "no such file or directory"),
        (["show", "smollm2-135m-instruct"], "did you mean asset:smollm2-135m-instruct"),
        (["show", "asset:smolm2"], "unknown asset 'smolm2'"),
        (["tree"], "no artifacts here yet"),
        (["assets", "fetch", "nope"], "unknown asset 'nope'"),
        (["assets", "path", "nope"], "unknown asset 'nope'"),
        (["stages", "train.sfd"], "did you mean 'train.sft'"),
        (["chat", "http://127.0.0.1:1/v1"], "no model"),
        (["data", "chat", "--data", "none.jsonl", "--out", "o"], "no such file or directory"),
        (["data", "chat", "--out", "o"], "--data"),
        (["data", "chat", "--data", "empty.jsonl", "--out", "o"], "is empty"),
        (["data", "chat", "--data", "broken.jsonl", "--out", "o"], "line 1"),
        (["data", "chat", "--data", "good.jsonl", "--set", "fromat=bfcl", "--out", "o"], "fromat"),
        (["data", "chat", "--data", "good.jsonl", "--set", "fromat=bfcl", "--out", "o"], "did you mean 'format'"),
        (["data", "chat", "--data", "good.jsonl", "--set", "format=bfcl", "--out", "o"], "takes a directory"),
        (
            ["data", "clean", "--data", "good.jsonl", "--set", "gopher_quality.nofield=1", "--out", "o"],
            "known: min_doc_words",
        ),
        (
            ["data", "mix", "--data", "good.jsonl", "--out", "o"],
            "--data good.jsonl: name is missing, write --data NAME=good.jsonl",
        ),
        (
            ["data", "mix", "--data", "a=good.jsonl", "--data", "a=good.jsonl", "--out", "o"],
            "the name 'a' is given twice",
        ),
        (["data", "mix", "--data", "a=", "--out", "o"], "name is missing"),
        (["data", "clean", "--data", "good.jsonl", "--data", "good.jsonl", "--out", "o"], "--data is given 2 times"),
        (["data", "clean", "--data", "", "--out", "o"], "empty reference"),
        (["rnu", "recipe.yaml"], "unknown command 'rnu', did you mean 'run'"),
        (["dta", "chat", "--data", "good.jsonl"], "did you mean 'data chat'"),
        (["show", "quickstart/nothing"], "no such file or directory, neither here nor in"),
        (["gc"], "not a workspace"),
        (["data", "--hlp"], "unknown command 'data --hlp', the group has data chat"),
        (["data", "split", "--data", "good.jsonl", "--out", "o"], "config.split is missing (Literal['train', 'test'"),
        (["data", "chat", "--data", "good.jsonl", "--config", "bad.yaml", "--out", "o"], "bad.yaml:2: not YAML"),
        (["chat", "http://127.0.0.1:1/v1#m?retires=1", "hi"], "unknown option 'retires', did you mean 'retries'?"),
        (["chat", "cut", "hi", "--max-tokens", "-4"], "max_tokens is -4"),
        (["chat", "cut", "hi", "--temperature", "-1"], "temperature is -1"),
        (["data", "chat", "--data", "good.jsonl", "--set", "format", "--out", "o"], "key=value"),
        (["data", "chat", "--data", "good.jsonl", "--config", "none.yaml", "--out", "o"], "none.yaml: no such file"),
        (["data", "chat", "--data", "good.jsonl", "--out", "mine"], "already exists"),
        (["data", "chat", "--data", "notes.txt", "--out", "o"], "supported are .jsonl"),
        (["data", "split", "--data", "good.jsonl", "--set", "split=test", "--out", "o"], "no Parquet files"),
        (
            ["train", "sft", "--model", "good.jsonl", "--data", "good.jsonl", "--out", "o"],
            "is a dataset, expected model",
        ),
        (
            ["evaluate", "good.jsonl", "--max-tokens=5"],
            "--max-tokens=5 (max_tokens is set with --set max_tokens=VALUE)",
        ),
        (["evaluate", "good.jsonl", "--nothing", "5"], "(see llmworks evaluate --help)"),
        (["quantize", "gguf", "--model", "cut", "--out", "o"], "truncated"),
        (["merge"], "the file is missing: mergekit's YAML"),
        (["merge", "none.yml", "--out", "o"], "none.yml: no such file; give mergekit's YAML"),
        (
            ["merge", "two.yml", "--set", "merge_method=slrp", "--out", "o"],
            "two.yml: merge_method: 'slrp' is not known",
        ),
        (["merge", "two.yml", "--set", "models.2.parameters.weight=1", "--out", "o"], "'2' is no place in a list of 1"),
        (
            ["merge", "two.yml", "--set", "models.0.parameters.weight=much", "--out", "o"],
            "nowhere: no such file or directory",
        ),
        (["quantize", "gguf", "--model", "bad.gguf", "--out", "o"], "is already gguf"),
        (["model", "from_gguf", "--source", "bad.gguf", "--out", "o"], "not a readable GGUF file"),
        (["chat", "bad.gguf", "hi"], "not a readable GGUF file"),
    ],
)
def test_one_line_and_exit_code_2(tmp_path: Path, pico: Path, words: list[str], said: str) -> None:
    (tmp_path / "two.yml").write_text("merge_method: linear\nmodels:\n  - model: nowhere\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "good.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no")
    (tmp_path / "mine").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((pico / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((pico / "model.safetensors").read_bytes()[:5000])
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob("workspace/store/[!.]*"))


def test_broken_line_is_kept_aside_and_counted(tmp_path: Path, chat_file: Path) -> None:
    chat_file.write_text(chat_file.read_text() + "{broken\n")
    done = call("data", "chat", "--data", chat_file, "--out", "o", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["metrics"]["rejected"] == 1
    assert "line 13: not JSON" in done.stderr
    kept = json.loads((tmp_path / "o" / "rejected.jsonl").read_text())
    assert (kept["line"], kept["text"]) == (13, "{broken\n")


def test_a_name_that_was_of_another_kind_is_told(tmp_path: Path, chat_file: Path, pico: Path) -> None:
    made = call("data", "chat", chat_file, "--out", "one", "--quiet", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "linked to a" not in made.stderr
    before = (tmp_path / "one").resolve()
    again = call("quantize", "gguf", pico, "--set", "type=Q8_0", "--out", "one", "--quiet", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "one linked to a dataset before" in again.stderr
    assert before.exists()
    assert (tmp_path / "one" / "model.gguf").exists()


def test_usage_says_what_must_be_given(tmp_path: Path) -> None:
    assert (
        call("quantize", "gguf", "--help", cwd=tmp_path).stdout.splitlines()[0]
        == "usage: llmworks quantize gguf --model REF [--data REF] [--imatrix REF] [--set KEY=VALUE ...] --out NAME"
        " [other options]"
    )


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As all the others, which are called in this one."""
    done = subprocess.run(
        [sys.executable, "-m", "llmworks.cli", "rnu"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("llmworks: unknown command 'rnu', did you mean 'run'")
    assert len(done.stderr.splitlines()) == 1


def test_a_group_lists_its_stages_and_commands(tmp_path: Path) -> None:
    listed = call("tune", cwd=tmp_path).stdout
    assert listed.startswith("usage: llmworks tune STAGE [--INPUT] REF ...")
    assert all(f"  {name} " in listed for name in ("tune evolve", "tune frontier", "tune benchmark", "tune sweep"))
    assert "train selftest" in call("train", "--help", cwd=tmp_path).stdout


def test_listings(tmp_path: Path) -> None:
    assert "train.sft" in call("stages", cwd=tmp_path).stdout
    assert (
        "learning_rate" in call("stages", "train.sft", cwd=tmp_path).stdout
        or "optimizer" in call("stages", "train.sft", cwd=tmp_path).stdout
    )
    assert "Apache-2.0" in call("assets", "list", cwd=tmp_path).stdout
    assert json.loads(call("assets", "list", "--json", cwd=tmp_path).stdout)["bfcl-simple"]["kind"] == "dataset"
    assert json.loads(call("stages", "--schema", cwd=tmp_path).stdout)["title"] == "llmworks recipe"
    assert call("--version", cwd=tmp_path).stdout.startswith("llmworks 0.")


def test_chat_in_the_terminal(tmp_path: Path, pico: Path, pico_gguf: Path) -> None:
    answers = [call("chat", ref, "--max-tokens", "8", "hi there", cwd=tmp_path) for ref in (pico, f"gguf:{pico_gguf}")]
    assert [a.returncode for a in answers] == [0, 0], answers
    assert answers[0].stdout == answers[1].stdout != "\n"
