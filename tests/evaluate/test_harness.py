"""The lm-evaluation-harness, run here on the same model and the same rows: the same prompts, the same
log-probabilities, the same scores, sample by sample.

Task files of the harness are read as they are; tasks of this project are written for it and score the same there.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmworks.core.artifact import Artifact, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.evaluate.protocol.load_task import load_task
from llmworks.evaluate.protocol.write_harness import to_harness
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model
from llmworks.runtime.session import load
from llmworks.tokenize.load import load_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "user",
    "assistant",
    "weather",
    "what",
    "is",
    "in",
    "name",
    "city",
    "Oslo",
    "arguments",
    "get",
    "12",
    "7",
    "345",
]


def some(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        options = [some(draw, 1, 5) for _ in range(4)]
        rows.append(
            {
                "q": some(draw, 3, 9),
                "opts": options,
                "gold": draw.randrange(4),
                "letter": "ABCD"[i % 4],
                "text": some(draw, 40, 260),
                "number": f"{draw.randrange(9)}",
                "answers": [some(draw, 1, 2), "the"],
            }
        )
    return rows


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{q}}\nAnswer:",
    "doc_to_choice": "{{opts}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}, {"metric": "brier_score"}],
}
LETTERS = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q.strip()}}\nA. {{opts[0]}}\nB. {{opts[1]}}\nC. {{opts[2]}}\nD. {{opts[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "letter",
    "description": "Choose.\n\n",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 3,
    "metric_list": [{"metric": "acc"}],
}
FIRST = {"function": "regex", "regex_pattern": "([A-Za-z])"}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_target": "{{q[:1]}}",
    "num_fewshot": 2,
    "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [
        {
            "metric": "exact_match",
            "ignore_case": True,
            "ignore_punctuation": True,
            "regexes_to_ignore": [",", "[a-z]{4,}"],
        }
    ],
    "filter_list": [
        {
            "name": "strict",
            "filter": [{"function": "regex", "regex_pattern": "#### ([0-9]+)"}, {"function": "take_first"}],
        },
        {
            "name": "flexible",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        },
        {"name": "first", "filter": [FIRST, {"function": "take_first"}]},
        {
            "name": "lower",
            "filter": [{"function": "lowercase"}, {"function": "remove_whitespace"}, {"function": "take_first"}],
        },
    ],
}
TASKS: dict[str, dict[str, Any]] = {
    "options of several tokens, no shots": CHOICE,
    "options of several tokens, other shots for each": {**CHOICE, "num_fewshot": 3},
    "a question that ends in white space": {
        **CHOICE,
        "doc_to_text": "Question: {{q}}\nAnswer: ",
        "target_delimiter": "",
        "num_fewshot": 1,
    },
    "an empty question": {**CHOICE, "doc_to_text": ""},
    "a beginning of the answer": {**CHOICE, "gen_prefix": "It is", "num_fewshot": 2},
    "letters, the same shots for all": LETTERS,
    "several right options": {
        **CHOICE,
        "doc_to_target": "{{[gold, 0]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "prompts that are too long": {**CHOICE, "doc_to_text": "{{text}} {{text}} {{q}}", "num_fewshot": 1},
    "the last word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    },
    "texts, rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}} {{text}}",
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "answers, extracted three ways": GENERATE,
    "several right answers": {
        **GENERATE,
        "doc_to_target": "{{['a', 'b', 'T', 'o', q[:1]]}}",
        "filter_list": [{"name": "first", "filter": [FIRST, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    },
    "translations": {
        **GENERATE,
        "doc_to_target": "{{q}}",
        "filter_list": None,
        "metric_list": [{"metric": "bleu", "aggregation": "bleu"}, {"metric": "chrf", "aggregation": "chrf"}],
    },
}


@pytest.fixture(scope="module")
def theirs(pico: Path) -> HFLM:
    return HFLM(pretrained=load_model(pico), tokenizer=load_tokenizer(pico), batch_size=4, device="cpu", max_length=512)


@pytest.fixture
def ours(tmp_path: Path, pico: Path) -> Callable[..., dict[str, Any]]:
    def run(task: Path, rows: Path, fewshot: str = "", **config: Any) -> dict[str, Any]:
        place = tmp_path / "run"
        (place / "out").mkdir(parents=True, exist_ok=True)
        (place / "scratch").mkdir(exist_ok=True)
        report = ReportBuilder()

        def open_engine(artifact: Artifact) -> TorchEngine:
            return TorchEngine.open(pico)

        model, data = load(str(pico)), load(str(rows))
        examples = load(fewshot) if fewshot else None
        assert isinstance(model, Model)
        assert isinstance(data, Dataset)
        made = evaluate(
            EvaluateConfig(task=str(task), **config),
            model,
            data,
            Context(place / "out", place / "scratch", 0, Progress(quiet=True), report, open_engine),
            examples if isinstance(examples, Dataset) else None,
        )
        assert isinstance(made, Report)
        return report.data

    return run


def write_task(tmp_path: Path, fields: dict[str, Any], count: int = 24) -> tuple[Path, Path]:
    rows, task = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
    source = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "fewshot_split": "test",
    }
    task.write_text(yaml.safe_dump({**source, **{k: v for k, v in fields.items() if v is not None}}))
    return task, rows


def harness(lm: HFLM, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        num_fewshot=task.get("num_fewshot", 0),
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )


LATER = (
    "letters, the same shots for all",
    "answers, extracted three ways",
    "options of several tokens, no shots",
    "several right options",
    "several right answers",
    "an empty question",
    "a question that ends in white space",
    "prompts that are too long",
    "translations",
    "a beginning of the answer",
)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what in LATER else what for what in TASKS]
)
def test_sample_by_sample(
    what: str, tmp_path: Path, theirs: HFLM, ours: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows = write_task(tmp_path, TASKS[what])
    fields = yaml.safe_load(file.read_text())
    found = harness(theirs, dict(fields), monkeypatch, tmp_path)
    task = load_task(str(file))
    made = ours(file, rows)
    by_filter: dict[str, list[Any]] = {}
    for sample in found["samples"]["t"]:
        by_filter.setdefault("" if sample["filter"] == "none" else sample["filter"], []).append(sample)
    assert set(by_filter) == set(task.extract)
    assert len(made["samples"]) == 24
    for way, samples in by_filter.items():
        for sample, other in zip(samples, made["samples"], strict=True):
            if task.kind == "generate":
                assert other["text"] == sample["resps"][0][0]
                assert other["answers"][way] == [sample["filtered_resps"][0]]
            else:
                given = [r[0] for r in sample["resps"]] if task.kind == "choice" else sample["resps"][0]
                logprobs = [r[0] for r in given] if task.kind != "perplexity" else [given[0]]
                assert (other["logprobs"] if task.kind == "choice" else [sum(other["logprobs"])]) == pytest.approx(
                    logprobs, rel=2e-5, abs=2e-4
                )
            for metric in task.metrics:
                name = metric.name + (f"/{way}" if way else "")
                if metric.name in ("acc", "acc_norm", "acc_bytes", "exact_match"):
                    assert other["scores"][name] == sample[metric.name], (other["id"], name)
    results = found["results"]["t"]
    for name, value in made["intervals"].items():
        metric, _, way = name.partition("/")
        if metric != "brier_score" or isinstance(results[f"brier_score,{way or 'none'}"], float):
            assert value["value"] == pytest.approx(results[f"{metric},{way or 'none'}"], rel=1e-4), name
            assert value["low"] <= value["value"] <= value["high"]
    assert len({json.dumps(s["scores"]) for s in made["samples"]}) > 1  # something is told apart


@pytest.mark.parametrize(
    "what",
    [
        *(
            pytest.param(w, marks=pytest.mark.slow)
            for w in (
                "options of several tokens, other shots for each",
                "answers, extracted three ways",
                "letters, the same shots for all",
                "the last word",
                "texts, rolling",
                "a beginning of the answer",
            )
        )
    ],
)
def test_there_and_back(
    what: str, tmp_path: Path, theirs: HFLM, ours: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that was read, written again for the harness: it runs there, and says the same."""
    file, _ = write_task(tmp_path, TASKS[what])
    written = to_harness(load_task(str(file)))
    first, again = (
        harness(theirs, yaml.safe_load(file.read_text()), monkeypatch, tmp_path),
        harness(theirs, json.loads(json.dumps(written)), monkeypatch, tmp_path),
    )
    numbers = [{k: v for k, v in r["results"]["t"].items() if isinstance(v, float)} for r in (first, again)]
    assert numbers[0] == numbers[1]
    assert numbers[0]


@pytest.mark.slow
def test_chat_prompts_are_those_of_the_harness(
    tmp_path: Path, theirs: HFLM, ours: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in turns, with the model's own template."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for fields in (LETTERS, GENERATE):
        file, rows = write_task(tmp_path, fields)
        found = lm_eval.simple_evaluate(
            theirs,
            tasks=[yaml.safe_load(file.read_text())],
            num_fewshot=fields["num_fewshot"],
            log_samples=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
        made = ours(file, rows, prompt_format="chat")
        first = [s for s in found["samples"]["t"] if s["filter"] in ("none", "strict")]
        for sample, other in zip(first, made["samples"], strict=True):
            if "logprobs" in other:
                assert other["logprobs"] == pytest.approx([r[0][0] for r in sample["resps"]], rel=2e-5, abs=2e-4)
            else:
                assert other["text"] == sample["resps"][0][0]


REFUSED = {
    "a function": ({"doc_to_text": "!function utils.text"}, "doc_to_text is a Python function"),
    "process_docs": ({"process_docs": "!function utils.docs"}, "process_docs is a Python function"),
    "an unknown field": ({"doc_to_image": "x"}, "field 'doc_to_image'"),
    "an unknown filter": (
        {"filter_list": [{"name": "x", "filter": [{"function": "majority_vote"}]}]},
        "filter 'majority_vote'",
    ),
    "an unknown metric": ({"metric_list": [{"metric": "mcc"}]}, "'mcc' is not supported"),
    "an unknown sampler": ({"fewshot_config": {"sampler": "balanced"}}, "sampler 'balanced'"),
    "an unknown way to write": (
        {"output_type": "generate_until", "generation_kwargs": {"top_k": 5}},
        "generation_kwargs.top_k",
    ),
    "an unknown type": ({"output_type": "guess"}, "unknown output_type 'guess'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_data_is_refused_by_name(what: str, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    file, _ = write_task(tmp_path, {**CHOICE, **change})
    file.write_text(
        file.read_text()
        .replace("'!function utils.text'", "!function utils.text")
        .replace("'!function utils.docs'", "!function utils.docs")
    )
    with pytest.raises(UserError, match=message) as caught:
        load_task(str(file))
    assert str(file) in str(caught.value)


def test_files_include_others(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**CHOICE, "num_fewshot": 4}))
    (tmp_path / "one.yaml").write_text("task: one\ninclude: base.yaml\nnum_fewshot: 2\n")
    task = load_task(str(tmp_path / "one.yaml"))
    assert (task.name, task.shots.count, task.kind) == ("one", 2, "choice")
    (tmp_path / "two.yaml").write_text("task: two\ninclude: none.yaml\n")
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_task(str(tmp_path / "two.yaml"))


def test_the_harness_own_files_are_read() -> None:
    """Every task file of the harness that is data is read; what is refused is code, or is not of the common subset, and
    is named.
    """
    read, refused = 0, {}
    for file in sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if "output_type" not in text or "task:" not in text or file.name.startswith("_"):
            continue
        try:
            load_task(str(file))
            read += 1
        except UserError as error:
            refused[file.name] = str(error).removeprefix(str(file))
    print(read, len(refused))
    for name in ("arc_easy", "gsm8k", "lambada_openai", "piqa", "boolq", "openbookqa", "logiqa"):
        assert not any(file == f"{name}.yaml" for file in refused) or "function" in refused[f"{name}.yaml"], (
            refused.get(f"{name}.yaml")
        )
    assert read > 100
