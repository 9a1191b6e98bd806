"""Task files of the lm-evaluation-harness as they are, on local rows of their format: the same prompts and scores."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.evaluate.test_harness import harness, ours, some, theirs

from llmworks.core.errors import DataError, UserError
from llmworks.evaluate.protocol.harness import read_fields
from llmworks.evaluate.protocol.load_task import load_task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    from lm_eval.config.task import FewshotConfig, TaskConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

__all__ = ["ours", "theirs"]  # fixtures
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
ROOT = Path(lm_eval.__file__).parent / "tasks"
DOCS = Path(__file__).parents[2] / "docs" / "lm-eval.md"
Row = dict[str, Any]


def four(draw: random.Random) -> dict[str, Any]:
    return {"text": [some(draw, 1, 4) for _ in range(4)], "label": ["A", "B", "C", "D"]}


def words(draw: random.Random, *names: str) -> Row:
    return {name: some(draw, 3, 9) for name in names}


ROWS: dict[str, Callable[[random.Random], Row]] = {
    "swag/swag.yaml": lambda d: {**words(d, "startphrase", *(f"ending{i}" for i in range(4))), "label": d.randrange(4)},
    "super_glue/boolq/seq2seq.yaml": lambda d: {**words(d, "passage", "question"), "label": d.randrange(2)},
    "gsm8k/gsm8k-cot.yaml": lambda d: {**words(d, "question"), "answer": f"{some(d, 2, 5)}\n#### {d.randrange(90)}"},
    "asdiv/default.yaml": lambda d: {**words(d, "body", "question"), "answer": f"{d.randrange(9)} (apples)"},
    "triviaqa/default.yaml": lambda d: {**words(d, "question"), "answer": {"aliases": [some(d, 1, 1), "the"]}},
    "mmlu/default/mmlu_anatomy.yaml": lambda d: {
        **words(d, "question"),
        "choices": four(d)["text"],
        "answer": d.randrange(4),
    },
    "super_glue/boolq/default.yaml": lambda d: {**words(d, "passage", "question"), "label": d.randrange(2)},
    "arc/arc_easy.yaml": lambda d: {**words(d, "question"), "choices": four(d), "answerKey": d.choice("ABCD")},
    "arc/arc_challenge_chat.yaml": lambda d: {
        **words(d, "question"),
        "choices": four(d),
        "answerKey": d.choice("ABCD"),
    },
    "piqa/piqa.yaml": lambda d: {**words(d, "goal", "sol1", "sol2"), "label": d.randrange(2)},
    "openbookqa/openbookqa.yaml": lambda d: {
        **words(d, "question_stem"),
        "choices": four(d),
        "answerKey": d.choice("ABCD"),
    },
    "sciq/sciq.yaml": lambda d: words(
        d, "support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"
    ),
    "siqa/siqa.yaml": lambda d: {
        **words(d, "context", "question", "answerA", "answerB", "answerC"),
        "label": d.choice("123"),
    },
    "commonsense_qa/default.yaml": lambda d: {
        **words(d, "question"),
        "choices": {"text": [some(d, 1, 3) for _ in range(5)]},
        "answerKey": d.choice("ABCDE"),
    },
    "gsm8k/gsm8k.yaml": lambda d: {**words(d, "question"), "answer": f"{some(d, 2, 5)}\n#### {d.randrange(90)}"},
    "nq_open/nq_open.yaml": lambda d: {**words(d, "question"), "answer": [some(d, 1, 1), some(d, 1, 2)]},
    "lambada/lambada_openai.yaml": lambda d: {"text": some(d, 12, 30)},
    "lambada_cloze/lambada_openai_cloze.yaml": lambda d: {"text": some(d, 12, 30)},
    "anli/anli_r1.yaml": lambda d: {**words(d, "premise", "hypothesis"), "label": d.randrange(3)},
    "babi/babi.yaml": lambda d: {**words(d, "passage", "question"), "answer": some(d, 1, 1)},
    "hendrycks_ethics/commonsense.yaml": lambda d: {**words(d, "input"), "label": d.randrange(2)},
    "unscramble/anagrams1.yaml": lambda d: {**words(d, "context"), "completion": some(d, 1, 1)},
    "headqa/headqa_en.yaml": lambda d: {
        **words(d, "qtext"),
        "answers": [{"atext": some(d, 1, 4)} for _ in range(4)],
        "ra": d.randint(1, 4),
    },
    "super_glue/wic/default.yaml": lambda d: {
        **words(d, "sentence1", "sentence2"),
        "start1": 0,
        "end1": 4,
        "label": d.randrange(2),
    },
    "glue/sst2/default.yaml": lambda d: {**words(d, "sentence"), "label": d.randrange(2)},
    "mgsm/direct/mgsm_direct_de.yaml": lambda d: {
        **words(d, "question"),
        "answer": d.choice([None, "42"]),
        "answer_number": d.randrange(90),
    },
    "xnli/xnli_de.yaml": lambda d: {**words(d, "premise", "hypothesis"), "label": d.randrange(3)},
    "belebele/belebele_deu_Latn.yaml": lambda d: {
        **words(d, "flores_passage", "question", *(f"mc_answer{i}" for i in range(1, 5))),
        "correct_answer_num": d.choice("1234"),
    },
    "pile/pile_arxiv.yaml": lambda d: {"text": some(d, 40, 260)},
    "storycloze/storycloze_2016.yaml": lambda d: {
        **words(d, *(f"input_sentence_{i}" for i in range(1, 5)), "sentence_quiz1", "sentence_quiz2"),
        "answer_right_ending": d.randint(1, 2),
    },
    "kmmlu/direct/kmmlu_direct_law.yaml": lambda d: {**words(d, "question", *"ABCD"), "answer": d.randint(1, 4)},
    "truthfulqa/truthfulqa_mc1.yaml": lambda d: {**words(d, "question"), "mc1_targets": {"choices": four(d)["text"]}},
}
QUICK = list(ROWS)[:5]


def write_local(file: str, tmp_path: Path) -> tuple[dict[str, Any], Path, Path]:
    """A task file whose dataset is local rows, changed in nothing else but the number of few-shot examples."""
    fields = load_yaml(ROOT / file, resolve_func=False)
    splits = ("training_split", "validation_split", "test_split", "fewshot_split")
    names = dict.fromkeys(str(fields[split]) for split in splits if fields.get(split))
    draw, files = random.Random(file), {}
    for name in names:
        files[name] = str(tmp_path / f"{name}.jsonl")
        rows = [ROWS[file](draw) for _ in range(18)]
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # with a test split only, the harness may show a question as its own example, see below
    zero_shot = fields["output_type"] == "loglikelihood_rolling" or (len(names) == 1 and fields.get("test_split"))
    fields |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    fields["num_fewshot"] = 0 if zero_shot else 2
    if fields["output_type"] == "generate_until":
        fields["generation_kwargs"] = {**fields["generation_kwargs"], "max_gen_toks": 16}
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return fields, task, Path(files[str(fields.get("test_split") or fields["validation_split"])])


@pytest.mark.parametrize("file", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in ROWS])
def test_the_harness_own_files_score_the_same(
    file: str, tmp_path: Path, theirs: HFLM, ours: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, path, rows = write_local(file, tmp_path)
    found = harness(theirs, fields, monkeypatch, tmp_path)
    task = load_task(str(path))
    made = ours(path, rows, task.examples)
    by_filter: dict[str, list[Any]] = {}
    (samples,) = found["samples"].values()
    for sample in samples:
        by_filter.setdefault("" if sample["filter"] == "none" else sample["filter"], []).append(sample)
    assert set(by_filter) == set(task.extract)
    different = []
    for way, expected in by_filter.items():
        assert len(expected) == len(made["samples"]) == 18
        for sample, own in zip(expected, made["samples"], strict=True):
            if task.kind == "generate":
                assert own["text"] == sample["resps"][0][0]
            else:
                given = [r[0] for r in sample["resps"]] if task.kind == "choice" else sample["resps"][0]
                logprobs = [float(r[0]) for r in given] if task.kind != "perplexity" else [float(given[0])]
                total = own["logprobs"] if task.kind == "choice" else [sum(own["logprobs"])]
                assert total == pytest.approx(logprobs, rel=2e-5, abs=2e-4)
            for metric in task.metrics:
                name = metric.name + (f"/{way}" if way else "")
                if metric.name in ("acc", "acc_norm", "exact_match") and own["scores"][name] != sample[metric.name]:
                    different.append((own["id"], name, own["scores"][name], sample[metric.name]))
    assert different == []
    (results,) = found["results"].values()
    for name, value in made["intervals"].items():
        metric_name, _, way = name.partition("/")
        assert value["value"] == pytest.approx(results[f"{metric_name},{way or 'none'}"], rel=1e-4), name


def test_every_field_of_the_format_has_its_fate() -> None:
    from lm_eval.api.registry import filter_registry

    fields = read_fields()
    assert set(TaskConfig.__dataclass_fields__) | {"include", "class", "group", "aggregate_metric_list"} == set(
        fields["task"]
    )
    assert set(FewshotConfig.__dataclass_fields__) == set(fields["fewshot_config"])
    assert {*filter_registry.keys(), "decontaminate"} == set(fields["filter"])
    fates = {fate.split(":")[0].split(";")[0] for section in fields.values() for fate in section.values()}
    assert fates == {"read", "ignored", "refused"}


NEW_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "median": ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, r"the aggregation 'median' of acc"),
    "direction": ({"metric_list": [{"metric": "acc", "higher_is_better": False}]}, r"acc is better higher"),
    "evaluate": ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, r"metric_list.hf_evaluate"),
    "two files": ({"dataset_kwargs": {"data_files": {"test": ["a.jsonl", "b.jsonl"]}}}, r"test has 2 files"),
    "a pattern": ({"dataset_kwargs": {"data_files": {"test": "*.jsonl"}}}, r"test has a pattern of files"),
    "a part of a file": ({"dataset_kwargs": {"field": "rows"}}, r"dataset_kwargs.field"),
    "indices": ({"fewshot_config": {"fewshot_indices": [0]}}, r"fewshot_config.fewshot_indices"),
    "other examples": ({"fewshot_config": {"doc_to_text": "{{q}}"}}, r"fewshot_config.doc_to_text"),
    "an option of a filter": (
        {"filter_list": [{"name": "x", "filter": [{"function": "lowercase", "locale": "tr"}]}]},
        r"the option 'locale' of lowercase",
    ),
    "repeats that are kept": (
        {
            "output_type": "generate_until",
            "metric_list": None,
            "repeats": 4,
            "filter_list": [{"name": "x", "filter": [{"function": "lowercase"}]}],
        },
        r"repeats is 4",
    ),
    "a group": ({"task": ["one", "two"]}, r"is a group of tasks"),
}
CHOICE: dict[str, Any] = {
    "task": "t",
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize("what", NEW_REFUSALS)
def test_what_is_not_obeyed_is_refused(what: str, tmp_path: Path) -> None:
    change, message = NEW_REFUSALS[what]
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump({**CHOICE, **change}))
    with pytest.raises(UserError, match=message):
        load_task(str(file))


def test_several_inputs_are_refused_at_the_row(tmp_path: Path, ours: Callable[..., dict[str, Any]]) -> None:
    """Where doc_to_text gives the number of a choice, the harness scores one answer after several contexts."""
    rows, file = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
    rows.write_text('{"q": 1, "gold": "because"}\n')
    file.write_text(yaml.safe_dump({**CHOICE, "doc_to_target": "gold"}))
    with pytest.raises(DataError, match=r"multiple\s+inputs"):
        ours(file, rows)


def test_a_question_is_never_its_own_example(tmp_path: Path, theirs: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with a test split only: the harness may show a question with its answer; here it is replaced, and the
    examples of all other questions stay those of the harness.
    """
    from llmworks.evaluate.protocol.questions import build_questions

    rows, file = [{"id": str(i), "q": f"word {i}", "gold": i % 2} for i in range(1, 13)], tmp_path / "task.yaml"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**CHOICE, "num_fewshot": 3, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    file.write_text(yaml.safe_dump(fields))
    found = harness(theirs, fields, monkeypatch, tmp_path)["samples"]["t"]
    made = build_questions(load_task(str(file)), rows, rows, same_pool=True)
    leaks = 0
    for sample, question in zip(found, made, strict=True):
        prompt = sample["arguments"]["gen_args_0"]["arg_0"] if isinstance(sample["arguments"], dict) else ""
        prompt = prompt or sample["arguments"][0][0]
        examples, own = prompt.split("\n\n")[:-1], f"word {question.id} "
        assert not any(example.startswith(own) for example in question.plain[0].split("\n\n")[:-1])
        if any(example.startswith(own) for example in examples):
            leaks += 1
        else:
            assert question.plain[0] == prompt
    assert leaks


def count_files() -> tuple[int, Counter[str]]:
    """How many task files of the installed harness are read, and why the others are refused."""
    read, refused = 0, Counter[str]()
    for file in sorted(ROOT.rglob("*.yaml")):
        if file.name.startswith("_") or "task:" not in file.read_text(encoding="utf-8"):
            continue
        try:
            load_task(str(file))
            read += 1
        except UserError as error:
            why = str(error).removeprefix(f"{file}: ").partition(" (")[0].partition("; ")[0]
            refused[re.sub(r"^the lm-evaluation-harness field ", "the field ", why).partition(", which")[0]] += 1
    return read, refused


def write_counts() -> str:
    read, refused = count_files()
    lines = [
        f"Of the {read + refused.total():,} task files of lm_eval {lm_eval.__version__}, {read:,} are read.",
        "",
        "| refused because | files |",
        "|---|---|",
        *(f"| {why} | {count:,} |" for why, count in sorted(refused.items(), key=lambda item: (-item[1], item[0]))),
    ]
    return "\n".join(lines)


def test_counts_in_the_docs_are_those_of_the_files() -> None:
    assert write_counts() in DOCS.read_text(encoding="utf-8")


if __name__ == "__main__":  # after a new version of the harness: the block of docs/lm-eval.md
    print(write_counts())
