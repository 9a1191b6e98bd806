"""Many quantizations of a model in one run: which are worth having, what the page says, what goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.runtime.session import load
from llmworks.tune.benchmark import BenchmarkConfig, benchmark
from llmworks.tune.tradeoff import (
    Skill,
    TradeoffConfig,
    Variant,
    describe_hidden_losses,
    pareto_front,
    recommend,
    tradeoff,
)
from llmworks.workflows.autoquant import QUANTIZATION_METHODS, select_methods


def way(name: str, size: int, kl: float, same: float = 0.9, **more: Any) -> Variant:
    return Variant(name=name, engine="x", digest=name, bytes=size, kl=kl, top1_agreement=same, **more)


MADE = [
    way("a", 50, 0.5, 0.6),
    way("b", 60, 0.6, 0.6),
    way("c", 70, 0.2, 0.8),
    way("d", 70, 0.3, 0.8),
    way("e", 80, 0.2, 0.8),
    way("f", 100, 0.01, 0.97),
    way("g", 120, 0.001, 0.99),
]


def test_what_something_smaller_beats_is_not_worth_having() -> None:
    best = pareto_front(sorted(MADE, key=lambda v: (v.bytes, v.kl)))
    assert [v.name for v in best] == ["a", "c", "f", "g"]
    assert recommend(best, None).name == "f"  # the smallest with the same best guess for 95 %
    assert recommend(best, 99).name == "c"
    assert recommend(best[:2], None).name == "c"
    with pytest.raises(DataError, match=r"no quantization is within 0.0 MB; the smallest is a with 0.0 MB"):
        recommend(best, 10)


def test_what_perplexity_hides_is_told() -> None:
    """A skill that falls beyond its interval while the perplexity stays; not one that falls within it, nor one where
    the perplexity rises, too.
    """

    def skill(score: float) -> dict[str, Skill]:
        return {"calls": Skill(score=score, low=score - 0.05, high=score + 0.05)}

    original = Variant(name="as it was", perplexity=10.0, skills=skill(0.8))
    assert (
        describe_hidden_losses(original, [way("x", 1, 0.1, perplexity=10.1, skills=skill(0.5))])
        == "x loses calls (0.8 to 0.5) although its perplexity rises by only 1.0%."
    )
    alike = [
        way("x", 1, 0.5, perplexity=36.0, skills=skill(0.6)),
        way("y", 1, 0.5, perplexity=37.0, skills=skill(0.1)),
        way("z", 1, 0.5, perplexity=37.1, skills=skill(0.3)),
        way("far", 1, 0.5, perplexity=60.0, skills=skill(0.0)),
    ]
    assert describe_hidden_losses(original, alike).endswith(
        "x and y have similar perplexities (36.00 and 37.00), but not on calls: 0.6 and 0.1."
    )
    assert "none was found" in describe_hidden_losses(
        original,
        [way("x", 1, 0.1, perplexity=10.1, skills=skill(0.75)), way("y", 1, 0.1, perplexity=12.0, skills=skill(0.1))],
    )


def test_a_page_without_results_is_none(tmp_path: Path) -> None:
    context = Context(
        tmp_path, tmp_path, 0, Progress(quiet=True), ReportBuilder(), lambda _: pytest.fail("no engine is needed")
    )
    with pytest.raises(DataError, match="no quantization of m succeeded; first error: too little text"):
        tradeoff(
            TradeoffConfig(
                model="m", original=Variant(name="as it was"), variants=[Variant(name="x", error="too little text")]
            ),
            context,
        )


def test_ways_by_name_and_by_beginning() -> None:
    assert list(select_methods(["gptq-4"])) == ["gptq-4"]
    assert {"gptq-4", "gptq-4-zero", "gptq-3"} == set(select_methods(["gptq"]))
    assert select_methods([]) == QUANTIZATION_METHODS
    with pytest.raises(UserError, match="no quantization method is named 'exl9'; known: absmax-8"):
        select_methods(["exl9"])


def test_running_is_measured(pico: Path, pico_gguf: Path, tmp_path: Path) -> None:
    """In both engines, by what they say: the same greedy answers of the same weights.

    The memory is not that of the process that has it measured, which the system counts until the other has started.
    """
    found, ballast = [], b"1" * (1 << 30)
    for number, ref in enumerate((str(pico), f"gguf:{pico_gguf}")):
        model: Any = load(ref)
        out = tmp_path / str(number)
        out.mkdir()
        made = benchmark(
            BenchmarkConfig(max_tokens=6, prompt_tokens=32),
            model,
            Context(
                out,
                out,
                0,
                Progress(quiet=True),
                report := ReportBuilder(),
                lambda _: pytest.fail("no engine is needed"),
            ),
        )
        assert 1e7 < made.metrics["peak_memory"] < len(ballast)
        assert made.metrics["prefill_speed"] > 0 < made.metrics["decode_speed"]
        found.append(report.data["completions"])
    assert found[0] == found[1]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be run"):
        benchmark(
            BenchmarkConfig(),
            Model(broken),
            Context(
                broken, broken, 0, Progress(quiet=True), ReportBuilder(), lambda _: pytest.fail("no engine is needed")
            ),
        )


def test_a_frontier_from_the_command_line(pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files and a directory, one way that cannot be had; again, and nothing is made anew; the recommended model is
    there under its name.
    """
    rows = tmp_path / "texts.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"id": str(i), "text": "the fox in Oslo asked what the weather is " * 30}) + "\n"
            for i in range(30)
        )
    )
    words = [
        "tune",
        "frontier",
        str(pico),
        "--data",
        str(rows),
        "--methods",
        "gguf-q8_0,gguf-q4_0,int8",
        "--num-calibration-samples",
        "2",
        "--eval-samples",
        "2",
        "--workspace",
        str(tmp_path / "ws"),
        "--quiet",
        "--json",
        "--out-model",
        str(tmp_path / "best"),
    ]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == first
    page = json.loads((Path(first["report"]) / "report.json").read_text())
    assert first["variants"] == 3
    assert first["recommended"] == "gguf-q8_0"
    assert {v["name"] for v in page["variants"] if v["kl"] is not None} == {"gguf-q8_0", "gguf-q4_0", "int8"}
    assert page["original"]["perplexity"] > 1
    assert (tmp_path / "best" / "model.gguf").exists()
    assert main([*words[:6], "gguf-q4_0,absmax-4", *words[7:]]) == 0  # groups of 64 do not divide rows of 96
    assert "rows of 96 weights are not divisible by group size 64" in capsys.readouterr().err
    assert (
        main(
            [
                "tune",
                "frontier",
                str(pico),
                "--data",
                str(rows),
                "--methods",
                "exl9",
                "--workspace",
                str(tmp_path / "ws"),
            ]
        )
        == 2
    )
    assert main([*words, "--budget", "0.001"]) == 2
    assert "no quantization is within 0.0 MB" in capsys.readouterr().err
