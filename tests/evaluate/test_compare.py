"""Two runs that differ in one thing, made to: the comparison names it.

Leaderboards compare only what was asked alike.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import TEMPLATE, make_pico

from llmworks.cli import main
from llmworks.core.artifact import Artifact, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import ArtifactError, DataError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Engine
from llmworks.evaluate.compare import CompareEvaluationsConfig, compare
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.evaluate.leaderboard import LeaderboardConfig, describe_lead, leaderboard, rank_models
from llmworks.evaluate.protocol.load_task import task_names
from llmworks.evaluate.statistics.bootstrap import holm
from llmworks.evaluate.statistics.entries import LeaderboardEntry
from llmworks.evaluate.suites import load_suites, resolve_items
from llmworks.generate.engines.torch import TorchEngine
from llmworks.runtime.session import load

CHOICE: dict[str, Any] = {
    "name": "t",
    "kind": "choice",
    "prompt": "plain",
    "question": "Q: {{q}}\nA:",
    "choices": "opts",
    "answer": "gold",
    "metrics": ["acc", "acc_norm"],
    "shots": {"count": 2},
}
GENERATE: dict[str, Any] = {
    "name": "t",
    "question": "{{q}}",
    "answer": "{{gold}}",
    "metrics": ["exact_match"],
    "max_tokens": 12,
}
Run = Callable[..., Report]


def rows_of(count: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    words = ["the", "quick", "brown", "fox", "user", "weather", "Oslo", "what", "is", "name", "city"]
    return [
        {
            "q": " ".join(draw.choices(words, k=draw.randint(3, 9))),
            "opts": [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(3)],
            "gold": draw.randrange(3),
        }
        for _ in range(count)
    ]


def context(place: Path, engine: Callable[[], Engine] | None = None, report: ReportBuilder | None = None) -> Context:
    (place / "out").mkdir(parents=True, exist_ok=True)
    (place / "scratch").mkdir(exist_ok=True)

    def open_engine(artifact: Artifact) -> Engine:
        assert engine is not None
        return engine()

    return Context(place / "out", place / "scratch", 0, Progress(quiet=True), report or ReportBuilder(), open_engine)


@pytest.fixture
def run(tmp_path: Path, pico: Path) -> Run:
    def go(
        name: str, fields: dict[str, Any], engine: Callable[[], Engine] | None = None, count: int = 40, **config: Any
    ) -> Report:
        task, data = tmp_path / f"{name}.yaml", tmp_path / "rows.jsonl"
        task.write_text(yaml.safe_dump(fields))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
        model, dataset = load(str(pico)), load(str(data))
        assert isinstance(model, Model)
        assert isinstance(dataset, Dataset)
        page = ReportBuilder()
        made = evaluate(
            EvaluateConfig(task=str(task), **config),
            model,
            dataset,
            context(tmp_path / name, engine or (lambda: TorchEngine.open(pico)), page),
        )
        page.write(tmp_path / name / "out")
        return Report(tmp_path / name / "out", name=name, metrics=made.metrics, about=made.about)

    return go


def other(tmp_path: Path, pico: Path, change: Callable[[TorchEngine], None]) -> Callable[[], Engine]:
    def make() -> Engine:
        engine = TorchEngine.open(pico)
        change(engine)
        return engine

    return make


def bos(engine: TorchEngine) -> None:
    from tokenizers.processors import TemplateProcessing

    engine.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )


def template(engine: TorchEngine) -> None:
    engine.tokenizer.chat_template = TEMPLATE.replace("assistant\n", "assistant \n\n")


def stops(engine: TorchEngine) -> None:
    counted = engine.generate([])
    assert counted == []
    engine.stops = frozenset(
        {
            2,
            *engine.tokenizer("e")["input_ids"],
            *engine.tokenizer("a")["input_ids"],
            *engine.tokenizer("t")["input_ids"],
        }
    )


def weights(engine: TorchEngine) -> None:
    import torch

    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.3)


def hair(engine: TorchEngine) -> None:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight.add_(0.02 * torch.randn_like(engine.model.model.embed_tokens.weight))


PLANTED: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[TorchEngine], None] | None]] = {
    "other examples": ("few-shot examples", CHOICE, {**CHOICE, "shots": {"count": 3}}, None),
    "other words": ("prompt text", CHOICE, {**CHOICE, "question": "Question: {{q}}\nA:"}, None),
    "turns and text": ("prompt style", CHOICE, {**CHOICE, "prompt": "chat"}, None),
    "a beginning token": ("BOS token", CHOICE, CHOICE, bos),
    "a template": ("template", {**CHOICE, "prompt": "chat"}, {**CHOICE, "prompt": "chat"}, template),
    "a short context": (
        "truncation",
        {**CHOICE, "question": "{{q * 9}}"},
        {**CHOICE, "question": "{{q * 9}}"},
        lambda e: (
            setattr(type("Short", (TorchEngine,), {"context": 40}), "x", 1)
            or setattr(e, "__class__", type("Short", (TorchEngine,), {"context": 40}))
        ),
    ),
    "weights": ("numbers", CHOICE, CHOICE, weights),
    "fewer tokens": ("max_tokens reached", GENERATE, {**GENERATE, "max_tokens": 4}, None),
    "a stop string": ("stop string", GENERATE, {**GENERATE, "stop": ["e", "a", "t"]}, None),
    "end tokens": ("stop token", GENERATE, GENERATE, stops),
    "another way to read": (
        "answer extraction",
        GENERATE,
        {**GENERATE, "extract": [{"how": "regex", "pattern": "[a-z]"}]},
        None,
    ),
    "other numbers in what is written": ("numbers", GENERATE, GENERATE, weights),
    "drawn answers": ("sampling", {**GENERATE, "temperature": 1.0}, {**GENERATE, "temperature": 1.4}, None),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_cause_is_named(what: str, run: Run, tmp_path: Path, pico: Path) -> None:
    wanted, left, right, change = PLANTED[what]
    a = run("a", left)
    b = run("b", right, other(tmp_path, pico, change) if change else None)
    made = compare(CompareEvaluationsConfig(bootstrap_iters=200), a, b, context(tmp_path / "compared"))
    causes = made.metrics["causes"]
    assert max(causes, key=causes.get) == wanted, causes
    if wanted not in ("answer extraction", "numbers", "max_tokens reached", "stop string", "stop token"):
        assert set(causes) == {wanted}
    assert made.metrics["num_differing"] == sum(causes.values()) > 0


def test_rounding_is_a_close_call(run: Run, tmp_path: Path, pico: Path) -> None:
    a, b = (
        run("a", {**CHOICE, "choices": ["fox", "the"], "answer": "0"}),
        run("b", {**CHOICE, "choices": ["fox", "the"], "answer": "0"}, other(tmp_path, pico, hair)),
    )
    made = compare(CompareEvaluationsConfig(bootstrap_iters=200), a, b, context(tmp_path / "compared"))
    left, right = ({s["id"]: s for s in r.read()["samples"]} for r in (a, b))
    for found in json.loads(json.dumps(_page(tmp_path / "compared", a, b)))["differing"]:
        close = min(abs(s["logprobs"][0] - s["logprobs"][1]) for s in (left[found["id"]], right[found["id"]])) < 0.1
        assert (found["cause"] == "close call") == close
    assert made.metrics["samples"] == 40


def _page(place: Path, a: Report, b: Report) -> dict[str, Any]:
    page = ReportBuilder()
    compare(CompareEvaluationsConfig(bootstrap_iters=200), a, b, context(place, report=page))
    page.write(place / "out")
    return page.data


def test_the_same_run_twice_differs_in_nothing(run: Run, tmp_path: Path) -> None:
    made = compare(
        CompareEvaluationsConfig(bootstrap_iters=200),
        run("a", CHOICE),
        run("b", CHOICE),
        context(tmp_path / "compared"),
    )
    assert (made.metrics["num_differing"], made.metrics["answer_agreement"], made.metrics["difference"]) == (
        0,
        1.0,
        0.0,
    )
    assert "causes" not in made.metrics


def test_lower_is_better_where_it_is(run: Run, tmp_path: Path, pico: Path) -> None:
    fields = {"name": "p", "kind": "perplexity", "question": "q", "metrics": ["bits_per_byte"]}
    a, b = run("a", fields), run("b", fields, other(tmp_path, pico, weights))
    worse = compare(CompareEvaluationsConfig(bootstrap_iters=500), a, b, context(tmp_path / "compared"))
    back = compare(CompareEvaluationsConfig(bootstrap_iters=500), b, a, context(tmp_path / "back"))
    sign = b.metrics["score"] > a.metrics["score"]
    assert {worse.about["verdict"], back.about["verdict"]} in ({"better", "worse"}, {"not significantly different"})
    assert worse.about["verdict"] != ("better" if sign else "worse")
    assert worse.metrics["gained"] == back.metrics["lost"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_the_page_is_filtered_by_cause(run: Run, tmp_path: Path, pico: Path) -> None:
    """In a browser: a button leaves only the samples with its cause."""
    a, b = run("a", GENERATE), run("b", GENERATE, other(tmp_path, pico, weights))
    _page(tmp_path / "compared", a, b)
    page = tmp_path / "compared" / "out" / "report.html"
    text = page.read_text()
    script = (
        "<script>const b=[...document.querySelectorAll('.filter"
        " button')].find(x=>x.dataset.tag==='numbers');b.click();"
        "const all=[...document.querySelectorAll('details[data-tags]')];"
        "document.title=all.filter(d=>!d.hidden).length+'/'+all.length</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", script + "</body>"))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'chromium'}",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    title = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout)
    assert title is not None
    assert int(title[1]) == text.count('numbers"') - text.count('data-tag="numbers"') or 0 < int(title[1]) <= int(
        title[2]
    )


def test_what_cannot_be_paired(run: Run, tmp_path: Path) -> None:
    a = run("a", CHOICE)
    for name, fields, count, message in (
        ("b", CHOICE, 30, "do not have the same task and samples"),
        ("c", {**CHOICE, "metrics": ["acc_norm"]}, 40, "differ in metric"),
        ("d", {**CHOICE, "name": "u"}, 40, "do not have the same task"),
    ):
        with pytest.raises(DataError, match=message):
            compare(CompareEvaluationsConfig(), a, run(name, fields, count=count), context(tmp_path / "x"))


def test_another_wording_is_no_other_answer(run: Run, tmp_path: Path) -> None:
    """Of texts that a function judges, calls are compared, or the verdict; of others what was extracted."""
    fields = {**GENERATE, "answer": {"regex": "zz+"}, "metrics": ["regex"]}
    a, b = run("a", fields, count=6), run("b", fields, count=6)
    data = b.read()
    calls = [
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
        'So: <tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 2}}</tool_call>',
    ]
    for report, texts in ((a, [calls[0], calls[0], "other words"]), (b, [calls[1], calls[2], "words of another kind"])):
        data = report.read()
        for sample, text in zip(data["samples"], texts, strict=False):
            sample["text"] = text
        (report.path / "report.json").write_text(json.dumps(data))
    made = compare(CompareEvaluationsConfig(bootstrap_iters=200), a, b, context(tmp_path / "compared"))
    assert (made.metrics["num_differing"], made.metrics["answer_agreement"]) == (1, pytest.approx(5 / 6))


def test_of_several_changes_none_is_blamed_alone(run: Run, tmp_path: Path) -> None:
    """With one change its cause is named; with two the page says that they cannot be separated."""
    a = run("a", CHOICE)
    for name, fields, said in (
        ("b", {**CHOICE, "question": "Question: {{q}}\nA:"}, ""),
        (
            "c",
            {**CHOICE, "question": "Question: {{q}}\nA:", "shots": {"count": 1}},
            "2 settings differ (question, shots)",
        ),
    ):
        page = ReportBuilder()
        compare(
            CompareEvaluationsConfig(bootstrap_iters=200),
            a,
            run(name, fields),
            context(tmp_path / f"to-{name}", report=page),
        )
        notes = " ".join(block.text for block in page.blocks)
        assert ("cannot be separated" in notes) == bool(said)
        assert said in notes


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no samples": (lambda d: d.pop("samples"), "without `samples`"),
    "samples are none": (lambda d: d.update(samples=[]), "samples"),
    "a score in words": (lambda d: d["samples"][3].update(score="right"), r"samples\.3\.score"),
    "a score is missing": (lambda d: d["samples"][3].pop("score"), r"sample '4' \(number 4\) has no `score`"),
    "one id twice": (lambda d: d["samples"][3].update(id="1"), "two samples have the id '1'"),
    "a log-probability in words": (lambda d: d["samples"][0].update(logprobs=["high"]), r"samples\.0\.logprobs\.0"),
    "an interval in words": (lambda d: d["intervals"].update(acc="wide"), r"intervals\.acc"),
    "samples by name": (lambda d: d.update(samples={"1": {}}), "samples: "),
}


@pytest.mark.parametrize("what", SPOILT)
def test_reports_that_were_changed_by_hand(what: str, run: Run, tmp_path: Path) -> None:
    spoil, message = SPOILT[what]
    a, b = run("a", CHOICE, count=8), run("b", CHOICE, count=8)
    data = b.read()
    spoil(data)
    (b.path / "report.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        compare(CompareEvaluationsConfig(), a, b, context(tmp_path / "x"))
    with pytest.raises(DataError, match=message):
        leaderboard(LeaderboardConfig(), [a, b], context(tmp_path / "y"))
    for text, said in (("{", "cannot be read"), ("[]", "not a report"), ("\udcff", "cannot be read")):
        (b.path / "report.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ArtifactError, match=said):
            compare(CompareEvaluationsConfig(), a, b, context(tmp_path / "x"))

            # boards


def test_holms_procedure() -> None:
    """A worked example: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_a_board_compares_only_what_was_asked_alike(run: Run, tmp_path: Path, pico: Path) -> None:
    reports = []
    for name, fields, change in (
        ("a", CHOICE, None),
        ("b", CHOICE, weights),
        ("c", {**CHOICE, "shots": {"count": 3}}, None),
        ("d", {"name": "p", "kind": "perplexity", "question": "q", "metrics": ["bits_per_byte"]}, None),
    ):
        made = run(name, fields, other(tmp_path, pico, change) if change else None)
        if change:
            made.about["model"] = "other"
            data = made.read()
            (made.path / "report.json").write_text(json.dumps({**data, "model": "heavier"}))
        reports.append(made)
    page = ReportBuilder()
    leaderboard(LeaderboardConfig(model=reports[0].about["model"]), reports, context(tmp_path / "board", report=page))
    page.write(tmp_path / "board" / "out")
    assert sorted(page.data["models"]) == ["heavier", "model"]
    columns = page.data["columns"]
    assert sorted(columns) == ["p", "t (2 shots)", "t (3 shots)"]
    assert [len([m for m in page.data["models"].values() if c in m["scores"]]) for c in columns] in (
        [1, 1, 2],
        [1, 2, 1],
        [2, 1, 1],
    )
    card = (tmp_path / "board" / "out" / "model-card.md").read_text()
    assert card.startswith("## Evaluation of ")
    assert card.count("\n| ") == 2 + 1  # of a task that was asked in two ways one
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "report.json").write_text("{}")
    with pytest.raises(DataError, match="is not a task evaluation"):
        leaderboard(LeaderboardConfig(), [Report(tmp_path / "z", name="z")], context(tmp_path / "y"))


def test_ranks_share_places() -> None:
    class Fake:
        def __init__(self, score: float, better: str = "higher") -> None:
            self.score, self.data = (score, score, score), {"better": better}

    cells: Any = {
        ("x", "1"): Fake(0.5),
        ("y", "1"): Fake(0.5),
        ("z", "1"): Fake(0.9),
        ("x", "2"): Fake(1.0, "lower"),
        ("y", "2"): Fake(2.0, "lower"),
        ("z", "2"): Fake(3.0, "lower"),
        ("x", "3"): Fake(1.0),
    }
    assert rank_models(cells, ["x", "y", "z"], ["1", "2", "3"]) == (
        [("x", (2.5 + 1) / 2), ("z", (1 + 3) / 2), ("y", (2.5 + 2) / 2)],
        ["1", "2"],
    )
    cells["w", "1"] = Fake(0.1)  # asked too little to be placed, and in nobody's way
    order, shared = rank_models(cells, ["w", "x", "y", "z"], ["1", "2", "3"])
    assert (order[0][0], order[-1], shared) == ("x", ("w", None), ["1", "2"])


def test_a_board_says_whether_its_first_is_ahead_by_more_than_chance() -> None:
    def entry(model: str, task: str, right: int) -> LeaderboardEntry:
        samples = [{"id": str(number), "group": str(number), "score": float(number < right)} for number in range(60)]
        return LeaderboardEntry(
            model,
            model,
            task,
            "",
            {
                "percent": True,
                "better": "higher",
                "samples": samples,
                "metric": "acc",
                "intervals": {"acc": {"value": right / 60, "low": 0, "high": 1}},
            },
        )

    cells = {
        (one.model, one.column): one
        for one in (
            entry("x", "1", 31),
            entry("y", "1", 30),
            entry("x", "2", 50),
            entry("y", "2", 12),
            entry("x", "3", 30),
            entry("y", "3", 31),
        )
    }
    assert (
        describe_lead(cells, ["x", "y"], ["1", "3"])
        == " No task shows a significant difference from y, which comes next."
    )
    assert (
        describe_lead(cells, ["x", "y"], ["1", "2", "3"])
        == " 1 of 3 tasks shows a significant difference from y, which comes next."
    )
    for one in cells.values():
        one.data["percent"] = False  # type: ignore[index]
    assert describe_lead(cells, ["x", "y"], ["1", "2"]) == ""


def test_suites_name_tasks_that_are_there() -> None:
    assert set(load_suites()) == {"quick", "general", "instruct", "code", "tools"}
    for suite in load_suites().values():
        assert {item.task for item in suite.tasks} <= set(task_names())
    assert [i.task for i in resolve_items("tools, logiqa", 7)] == ["function-call", "function-call-multiple", "logiqa"]
    assert {i.limit for i in resolve_items("tools, logiqa", 7)} == {7}
    with pytest.raises(UserError, match="did you mean 'quick'"):
        resolve_items("quik")
    with pytest.raises(UserError, match="no task given"):
        resolve_items(",")


@pytest.mark.slow
def test_autoeval_from_the_command_line(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    monkeypatch.chdir(tmp_path)
    second = make_pico(tmp_path / "second", seed=5)
    (tmp_path / "base").mkdir()
    shutil.copytree(pico, tmp_path / "base" / "m")
    names = "social-iqa,medmcqa,sarcasm,function-call"
    assert main(["autoeval", str(pico), str(second), "--suite", names, "--limit", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [s["task"] for s in told["scores"]] == ["social-iqa", "medmcqa", "sarcasm"] * 2 or len(told["scores"]) + len(
        told["failures"]
    ) == 8
    assert all(s["samples"] == 6 for s in told["scores"])
    page = (Path(told["board"]) / "report.html").read_text()
    assert "Leaderboard" in page
    assert page.count("<svg") >= 2  # bars and profile
    assert main(["autoeval", str(pico), "--suite", "medmcqa", "--limit", "6", "--out", "again"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert main(["autoeval", str(pico), "--suite", "mdmcqa"]) == 2
    assert "did you mean 'medmcqa'" in capsys.readouterr().err
    assert main(["autoeval", str(tmp_path / "none")]) == 2


def test_tasks_are_listed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*task_names(), *load_suites()))
    assert main(["tasks", "arc-easy", "--harness"]) == 0
    fields = yaml.safe_load(capsys.readouterr().out)
    assert (fields["output_type"], fields["dataset_path"], fields["dataset_name"]) == (
        "multiple_choice",
        "allenai/ai2_arc",
        "ARC-Easy",
    )
    assert main(["tasks", "logiqa"]) == 0
    (tmp_path / "own.yaml").write_text(capsys.readouterr().out)
    assert main(["tasks", str(tmp_path / "own.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "logiqa"
    assert main(["tasks", "function-call", "--harness"]) == 2
    assert "conversations cannot be exported" in capsys.readouterr().err


def test_buttons_are_few(tmp_path: Path) -> None:
    """Of 300 groups of one sample none has a button; of causes and scores each; few groups have theirs."""
    page = ReportBuilder()
    page.title = "many"
    page.add_pairs(
        "Differ",
        [(f"q{i}", ("a", "x"), ("b", "y")) for i in range(300)],
        tags=[("gained" if i % 3 else "lost", f"group-{i}") for i in range(300)],
    )
    page.write(tmp_path)
    assert re.findall(r'data-tag="([^"]+)"', (tmp_path / "report.html").read_text()) == ["gained", "lost"]
    page = ReportBuilder()
    page.add_pairs(
        "Differ",
        [(f"q{i}", ("a", "x"), ("b", "y")) for i in range(4)],
        tags=[("gained", f"group-{i}") for i in range(4)],
    )
    page.write(tmp_path)
    assert len(re.findall(r'data-tag="', (tmp_path / "report.html").read_text())) == 5
