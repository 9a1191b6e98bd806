"""Trainings side by side: values between two looks, who is ahead from when on, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmworks.cli import main
from llmworks.train.compare import TrainingHistory, describe_crossing, interpolate


def test_between_two_looks() -> None:
    points = [(10.0, 4.0), (20.0, 3.0), (40.0, 2.5)]
    assert [interpolate(points, x) for x in (5, 10, 15, 20, 30, 40, 41)] == [4.0, 4.0, 3.5, 3.0, 2.75, 2.5, None]
    assert interpolate([], 1) is None


def test_from_when_on() -> None:
    def run(*values: float) -> TrainingHistory:
        points = [(10.0 * (i + 1), value) for i, value in enumerate(values)]
        return TrainingHistory(points, points, 1, 1, values[-1], 1.0)

    assert "from 30 s on" in describe_crossing("a", {"a": run(4, 3.5, 2.5, 2.0), "b": run(3, 3, 3)})
    assert "from the first evaluation on" in describe_crossing("a", {"a": run(2, 2), "b": run(3, 3)})
    assert "never the best" in describe_crossing("a", {"a": run(4, 2, 4), "b": run(3, 3, 3)})
    assert describe_crossing("a", {"a": run(1)}) == ""


@pytest.mark.slow
def test_the_stage(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    for name, part in (("train", text[:9000]), ("test", text[9000:]), ("other", text[:2000])):
        (tmp_path / f"{name}.txt").write_text(part)
        assert (
            main(["data", "read", str(tmp_path / f"{name}.txt"), "--out", str(tmp_path / f"{name}-read"), "--quiet"])
            == 0
        )
        assert (
            main(
                [
                    "data",
                    "pack",
                    str(pico),
                    str(tmp_path / f"{name}-read"),
                    "--set",
                    "max_length=64",
                    "--out",
                    str(tmp_path / name),
                    "--quiet",
                ]
            )
            == 0
        )
    assert (
        main(
            [
                "model",
                "recurrent",
                str(pico),
                "--set",
                "rnn_type=gru",
                "--set",
                "embedding_dim=16",
                "--out",
                str(tmp_path / "gru"),
                "--quiet",
            ]
        )
        == 0
    )
    for name, held_out in (("a", "test"), ("b", "other")):
        words = [
            str(tmp_path / "gru"),
            str(tmp_path / "train"),
            "--eval-data",
            str(tmp_path / held_out),
            "--set",
            "batch_size=16",
            "--set",
            "eval_steps=4",
            "--set",
            "sample_max_tokens=0",
            "--out",
            str(tmp_path / name),
            "--quiet",
        ]
        assert main(["train", "pretrain", *words]) == 0
    assert (
        main(
            [
                "train",
                "ngram",
                str(pico),
                str(tmp_path / "train"),
                "--eval-data",
                str(tmp_path / "test"),
                "--out",
                str(tmp_path / "n"),
                "--quiet",
            ]
        )
        == 0
    )
    models = {name: f"{name}={tmp_path / name}" for name in ("a", "b", "n", "gru")}
    capsys.readouterr()
    assert (
        main(
            [
                "train",
                "compare",
                "--models",
                models["a"],
                "--models",
                models["n"],
                "--out",
                str(tmp_path / "c"),
                "--quiet",
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    figures = {
        name: json.loads((tmp_path / name / "manifest.json").read_text())["metrics"]["bits_per_byte"]
        for name in ("a", "n")
    }
    assert {name: one["bits_per_byte"] for name, one in report["models"].items()} == figures
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["metrics"]["improvement"] == round(
        figures["n"] - figures["a"], 5
    )
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("<svg") == 2
    capsys.readouterr()
    for words, says in (
        (["--models", models["a"]], "needs at least two models"),
        (["--models", models["a"], "--models", models["b"]], "not evaluated on the same held-out tokens"),
        (["--models", models["a"], "--models", models["n"], "--set", "baseline=x"], "config.baseline is 'x'"),
        (["--models", models["gru"], "--models", models["gru"].replace("gru=", "g=")], "has no eval metrics"),
    ):
        assert main(["train", "compare", *words, "--out", str(tmp_path / "o"), "--quiet"]) == 2
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
