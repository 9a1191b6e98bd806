"""The grid of trainings: what it holds, that it goes on after a kill, and that its report says what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.train import scaling
from llmworks.train.scaling_plan import ScalingConfig, ScalingModelSize, plan_run

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
SMALL = (
    "sizes=[{hidden_size: 16, num_hidden_layers: 1}, {hidden_size: 32, num_hidden_layers: 1}, {hidden_size: 48,"
    " num_hidden_layers: 2}, {hidden_size: 64, num_hidden_layers: 2}]",
    "flops=[1.0e+9, 2.0e+9]",
    "target={hidden_size: 64, num_hidden_layers: 3}",
    "target_flops=5.0e+9",
    "head_dim=16",
    "batch_size=2",
    "max_epochs=60",
    "min_steps=5",
    "eval_samples=8",
    "bootstrap_iters=20",
)


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    workspace = ["--workspace", str(folder / "ws"), "--quiet"]
    for name, part in (("train", TEXT[:9000]), ("test", TEXT[9000:])):
        (folder / name).mkdir()
        for i, paragraph in enumerate(part.split("\n\n")):
            (folder / name / f"{i:03}.txt").write_text(paragraph)
        assert main(["data", "read", str(folder / name), "--out", str(folder / f"{name}-read"), *workspace]) == 0
        assert (
            main(
                [
                    "data",
                    "pack",
                    str(pico),
                    str(folder / f"{name}-read"),
                    "--set",
                    "max_length=64",
                    "--out",
                    str(folder / f"{name}-packed"),
                    *workspace,
                ]
            )
            == 0
        )
    return folder


def words(made: Path, pico: Path, out: Path, *sets: str) -> list[str]:
    return [
        "train",
        "scaling",
        str(pico),
        str(made / "train-packed"),
        str(made / "test-packed"),
        *(w for s in (*SMALL, *sets) for w in ("--set", s)),
        "--out",
        str(out),
        "--workspace",
        str(out.parent / "ws"),
        "--quiet",
    ]


def test_a_run_has_the_work_it_should() -> None:
    """Six operations for each parameter that multiplies and each token, and attention's."""
    config = ScalingConfig(head_dim=16)
    plan, why = plan_run(config, ScalingModelSize(hidden_size=64, num_hidden_layers=2), 1e11, 512, 128, 1_000_000, 8000)
    assert plan is not None, why
    network = DecoderForCausalLM(DecoderConfig(shape=plan.shape.model_dump()))
    assert plan.parameters == sum(p.numel() for p in network.parameters())
    multiply = sum(p.numel() for p in network.parameters() if p.dim() == 2)  # the embedding once, as the head
    attention = 3 * 2 * 4 * 64 * 64  # layers, products, width, half of 128 tokens
    assert plan.flops == pytest.approx((6 * multiply + attention) * plan.tokens, rel=1e-3)
    assert plan.flops == pytest.approx(1e11, rel=0.05)
    assert plan_run(config, ScalingModelSize(hidden_size=64, num_hidden_layers=2), 1e8, 512, 128, 1_000_000, 8000)[
        1
    ].endswith("fewer than min_steps 20")
    assert (
        "more than max_epochs 4"
        in plan_run(config, ScalingModelSize(hidden_size=32, num_hidden_layers=1), 1e13, 512, 128, 1_000_000, 8000)[1]
    )


@pytest.mark.slow
def test_it_goes_on_and_tells(made: Path, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, trained = scaling.train_one, []

    def stopped(config: Any, plan: Any, *rest: Any) -> Any:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(plan.name)
        return real(config, plan, *rest)

    with monkeypatch.context() as kill:
        kill.setattr(scaling, "train_one", stopped)
        assert main(words(made, pico, tmp_path / "out")) == 130
    kept = {file.parent.name: file.stat().st_mtime_ns for file in tmp_path.glob("ws/scratch/*/*/run.json")}
    assert sorted(kept) == sorted(trained)
    seen: list[int] = []
    from llmworks.train.loop import loop

    counted = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: (seen.append(1), counted(*a, **k))[1])
    assert main(words(made, pico, tmp_path / "out")) == 0
    assert len(seen) == 4  # three of eight, and the target
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["runs"]) == 8
    assert {r["parameters"] for r in report["runs"]} >= {report["runs"][0]["parameters"]}
    assert report["predicted"]["low"] <= report["predicted"]["value"] <= report["predicted"]["high"]
    assert report["within"] == (report["predicted"]["low"] <= report["target"]["loss"] <= report["predicted"]["high"])
    losses = [r["loss"] for r in report["runs"]]
    assert all(
        more < less for less, more in zip(losses[:4], losses[4:], strict=True)
    )  # twice the work of the same size
    page = (tmp_path / "out" / "report.md").read_text()
    assert "within the interval" in page or "outside the interval" in page


def test_mistakes(made: Path, pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, says in (
        (("target_flops=1.0e+9",), "target_flops 1e+09 must exceed those of the grid"),
        (("head_dim=24",), "hidden_size 16 is not divisible by head_dim 24"),
        (("min_steps=100000",), "0 of 8 runs remain"),
        (
            (
                "flops=[1.0e+6, 1.0e+7, 1.0e+9]",
                "sizes=[{hidden_size: 16, num_hidden_layers: 1}, {hidden_size: 32, num_hidden_layers: 1},"
                " {hidden_size: 48, num_hidden_layers: 2}]",
            ),
            "a scaling law needs 8",
        ),
        (("flops=[1.0e+9, 1.0e+9]",), "contain duplicates"),
        (("flops=[.nan, 1.0e+9]",), "finite"),
        (("target_flops=.inf",), "finite"),
        (("head_dim=1",), "hidden_size 16, 1 layers: "),
    ):
        assert main(words(made, pico, tmp_path / "o", *more)) == 2
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
