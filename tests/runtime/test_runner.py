"""The runner on a small real recipe: cached, explained, resumed after kill -9, safe for two at once, stopped by gates,
verified.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import call

from llmworks.core.errors import GateFailed
from llmworks.core.workspace import Workspace
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.runner import RecipeRun, StepStatus
from llmworks.train.loop import checkpoints

WriteRecipe = Callable[..., Path]


def run(recipe: Path, workspace: Path, *overrides: str) -> tuple[dict[str, StepStatus], list[str]]:
    lines: list[str] = []
    done = RecipeRun(load_recipe(recipe, overrides), Workspace(workspace), say=lines.append, quiet=True).run(
        explain=True
    )
    return {j.name: j for j in done}, lines


def command(*words: object, workspace: Path | None = None) -> list[str]:
    return [
        sys.executable,
        "-m",
        "llmworks.cli",
        *map(str, words),
        *(["--workspace", str(workspace)] if workspace else []),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico: Path) -> tuple[Path, Path]:
    """(recipe, workspace) of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [
        {
            "id": f"r{i}",
            "group": f"g{i % 6}",
            "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}],
        }
        for i in range(12)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = folder / "small.yaml"
    recipe.write_text(f"""\
name: small
steps:
  base: {{use: "path:{pico}"}}
  raw: {{use: "path:{folder}/chats.jsonl"}}
  chats: {{stage: data.chat, inputs: {{data: raw}}}}
  train: {{stage: data.split, inputs: {{data: chats}}, config: {{split: train, n_splits: 3}}}}
  test: {{stage: data.split, inputs: {{data: chats}}, config: {{split: test, n_splits: 3}}}}
  overlap: {{stage: data.overlap, inputs: {{left: train, right: test}}}}
  disjoint: {{gate: overlap, metric: shared_groups, at_most: 0}}
  tuned:
    stage: train.sft
    inputs: {{model: base, data: train, eval_data: test}}
    config: {{num_train_epochs: 3, batch_size: 2, save_steps: 1, num_sample_prompts: 1}}
  merged: {{stage: merge.adapter, inputs: {{adapter: tuned, model: base}}}}
  small: {{stage: quantize.gguf, inputs: {{model: merged}}, config: {{type: f16}}}}
  page: {{stage: lineage.report, inputs: {{artifacts: [base, chats, train, test, tuned, merged, small]}}}}
""")
    run(recipe, folder / "w")
    return recipe, folder / "w"


def test_second_run_makes_nothing(finished: tuple[Path, Path]) -> None:
    done, lines = run(*finished)
    assert {j.state for j in done.values()} == {"up to date", "external", "gate holds"}
    assert any(line.startswith("✓ chats") and "up to date" in line for line in lines)


def test_changed_config_remakes_only_what_depends_on_it(finished: tuple[Path, Path]) -> None:
    recipe, workspace = finished
    judged = {
        j.name: j for j in RecipeRun(load_recipe(recipe, ["tuned.num_train_epochs=1"]), Workspace(workspace)).plan()
    }
    assert judged["train"].state == "up to date"
    assert judged["tuned"].state == "to run"
    assert "config.num_train_epochs was 3.0, is 1.0" in judged["tuned"].reason
    assert (judged["merged"].state, judged["merged"].reason) == ("waits", "for tuned")
    assert judged["tuned"].expect is not None
    assert judged["tuned"].expect.seconds > 0
    assert judged["tuned"].expect_source == "measured here"


def test_changed_code_is_told(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmworks.runtime.runner.compute_code_digest", lambda name: "other")
    recipe, workspace = finished
    judged = {j.name: j for j in RecipeRun(load_recipe(recipe), Workspace(workspace)).plan()}
    assert judged["chats"].state == "up to date"
    assert "its code has changed" in judged["chats"].reason


def test_a_gate_that_fails_stops_the_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, workspace = finished
    text = (
        recipe.read_text().replace("at_most: 0", "above: 0, because: of a test").replace("name: small", "name: gated")
    )
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(GateFailed, match=r"gate disjoint: overlap\.shared_groups is 0, required above 0 \(of a test\)"):
        run(tmp_path / "g.yaml", workspace)
    assert not (workspace / "gated" / "tuned").exists()
    assert (workspace / "gated" / "overlap").exists()


def test_show_tree_verify_diff_on_the_workspace(finished: tuple[Path, Path]) -> None:
    _, workspace = finished

    def read(*words: str) -> str:
        done = call(*words, "--workspace", workspace)
        assert done.returncode == 0
        return done.stdout

    shown = read("show", "small/merged")
    assert "merge.adapter" in shown
    assert "adapter: tuned" in shown
    assert "golden" in shown
    drawn = read("tree")
    assert all(name in drawn for name in ("base", "tuned", "merged", "small"))
    found = json.loads(read("verify", "small/small", "--json"))
    verdicts = {f["name"]: f["verdict"] for f in found}
    assert verdicts["small"] == verdicts["merged"] == verdicts["chats"] == "derived again, same bytes"
    assert verdicts["tuned"] == "declared"
    assert verdicts["raw"] == "external"
    assert "config" in read("diff", "small/train", "small/test")


def test_verify_lets_a_page_be_drawn_otherwise(finished: tuple[Path, Path]) -> None:
    """Another version's looks; not other figures, nor other data."""
    from llmworks.core.artifact import FileEntry
    from llmworks.lineage.family import build_family
    from llmworks.lineage.verify import verify
    from llmworks.runtime.execute import compute_recorded_key
    from llmworks.runtime.session import load

    chats = load(str((finished[1] / "small" / "chats").resolve()))
    assert chats.manifest is not None
    files, other = chats.manifest.files, FileEntry(sha256="0" * 64, bytes=1)
    assert "report/report.html" in files
    for changed, verdict in (
        (["report/report.html"], "derived again, same bytes"),
        (["report/report.html", "report/report.json"], "DIFFERS"),
        ([next(name for name in files if not name.startswith("report/"))], "DIFFERS"),
    ):
        found = verify(
            build_family([chats]),
            chats.digest,
            lambda _, changed=changed: {**files, **dict.fromkeys(changed, other)},  # type: ignore[misc]
            compute_recorded_key,
        )
        assert found[-1].verdict == verdict, changed


def test_verify_names_the_file_after_one_byte_is_flipped(finished: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    _, workspace = finished
    copy = tmp_path / "w"
    shutil.copytree(workspace, copy, symlinks=True)
    for name, file in (("merged", "model.safetensors"), ("small", "model.gguf")):
        path = (copy / "small" / name).resolve() / file
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
        done = call("verify", f"small/{name}", "--workspace", copy)
        assert done.returncode == 1
        assert file in done.stderr
        assert "Traceback" not in done.stderr
        data[-7] ^= 1
        path.write_bytes(data)


def steps_made(workspace: Path) -> dict[str, float]:
    """Step names and when their artifacts were finished."""
    return {p.name: p.resolve().stat().st_mtime for p in (workspace / "small").glob("*") if p.is_symlink()}


def kill_when(condition: Callable[[], bool], words: list[str]) -> None:
    """Start a command and kill -9 it as soon as the condition holds."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    deadline = time.monotonic() + 120
    while not condition():
        if child.poll() is not None:
            raise AssertionError(f"ended before it could be killed: {child.stderr.read().decode()}")
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stderr.close()


@pytest.mark.slow
def test_killed_while_training_goes_on_from_the_checkpoint(recipe_file: WriteRecipe, tmp_path: Path) -> None:
    recipe, workspace = recipe_file(num_train_epochs=60), tmp_path / "w"

    def at_step(n: int) -> bool:
        return any(len(f.read_text().splitlines()) >= n for f in workspace.glob("scratch/*/metrics.jsonl"))

    kill_when(lambda: at_step(20), command("run", recipe, workspace=workspace))
    assert "tuned" not in steps_made(workspace)
    before = steps_made(workspace)
    done = subprocess.run(command("run", recipe, workspace=workspace), capture_output=True, text=True, check=True)
    assert "resuming from step" in done.stderr
    assert int(done.stderr.split("resuming from step ")[1].split()[0]) >= 18
    after = steps_made(workspace)
    assert all(after[name] == stamp for name, stamp in before.items())
    clean = tmp_path / "clean"
    subprocess.run(command("run", recipe, workspace=clean), capture_output=True, check=True)
    weights = "model.safetensors"
    assert (clean / "small/merged" / weights).read_bytes() == (workspace / "small/merged" / weights).read_bytes()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("chats", marks=pytest.mark.slow),
        "train",
        pytest.param("merged", marks=pytest.mark.slow),
        pytest.param("small", marks=pytest.mark.slow),
    ],
)
def test_killed_while_making_a_step(recipe_file: WriteRecipe, tmp_path: Path, step: str) -> None:
    """Killed as soon as the step before is bound, that is while this one is being made."""
    recipe, workspace = recipe_file(), tmp_path / "w"
    previous = {"chats": None, "train": "chats", "merged": "tuned", "small": "merged"}[step]
    kill_when(
        lambda: (workspace / "store").exists() if previous is None else (workspace / "small" / previous).exists(),
        command("run", recipe, workspace=workspace),
    )
    before = steps_made(workspace)
    subprocess.run(command("run", recipe, workspace=workspace), capture_output=True, check=True)
    after = steps_made(workspace)
    assert {"chats", "train", "test", "tuned", "merged", "small"} <= set(after)
    assert all(after[name] == stamp for name, stamp in before.items())
    assert not list(workspace.glob("store/.draft-*"))


def test_a_full_disk_is_told_and_the_next_run_goes_on(
    recipe_file: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is really written to a device without space."""
    from llmworks.cli import main

    recipe, workspace = recipe_file(), tmp_path / "w"
    real, links = checkpoints.FileSystemWriter, []

    def writer(folder: Path) -> Any:
        links.append(folder / "__0_0.distcp")
        links[-1].symlink_to("/dev/full")
        return real(folder)

    with monkeypatch.context() as full:
        full.setattr(checkpoints, "FileSystemWriter", writer)
        assert main(["run", str(recipe), "--workspace", str(workspace), "--quiet"]) == 3
    assert f"llmworks: {workspace}: no space left; free some" in capsys.readouterr().err
    assert not list(workspace.glob("store/.draft-*"))
    assert not links[-1].is_symlink()
    assert main(["run", str(recipe), "--workspace", str(workspace), "--quiet"]) == 0
    assert "small" in steps_made(workspace)


def test_two_runs_at_once_share_the_work(recipe_file: WriteRecipe, tmp_path: Path) -> None:
    recipe, workspace = recipe_file(num_train_epochs=10), tmp_path / "w"
    pair = [
        subprocess.Popen(
            command("run", recipe, "--json", workspace=workspace),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [child.communicate() for child in pair]
    assert [child.returncode for child in pair] == [0, 0], results
    digests = [{j["step"]: j["digest"] for j in json.loads(out)} for out, _ in results]
    assert digests[0] == digests[1]
    made = [a for a in Workspace(workspace).artifacts() if a.kind == "adapter"]
    assert len(made) == 1


def test_stage_command_links_its_result(chat_file: Path, tmp_path: Path) -> None:
    words = ("data", "chat", "--data", chat_file, "--out", tmp_path / "chats", "--workspace", tmp_path / "w")
    assert "rows 12" in call(*words).stdout
    assert "up to date" in call(*words).stdout
    split = call(
        "data",
        "split",
        "--data",
        tmp_path / "chats",
        "--set",
        "split=test",
        "--set",
        "n_splits=3",
        "--out",
        tmp_path / "test",
        "--json",
        "--workspace",
        tmp_path / "w",
    )
    assert json.loads(split.stdout)["metrics"]["rows"] == 4
    assert "data.split" in call("show", tmp_path / "test", "--workspace", tmp_path / "w").stdout
