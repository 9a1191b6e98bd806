"""What must never happen without a word: another task under an old score, a row as its own example, a broken model with
a good score, a key in a report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.generate.loopback import Loopback, says

from llmworks.cli import main
from llmworks.core.errors import DataError, EngineError, LlmworksError, ModelError, UserError
from llmworks.core.types import Message, Request
from llmworks.evaluate.evaluate import EvaluateConfig
from llmworks.evaluate.protocol import templates
from llmworks.evaluate.protocol.load_task import load_task
from llmworks.evaluate.protocol.questions import build_questions, gold_indices, parse_gold
from llmworks.evaluate.protocol.task import Task
from llmworks.evaluate.protocol.templates import render, render_string, render_value
from llmworks.evaluate.statistics.bootstrap import sum_by_group
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.remote.endpoint import RemoteOptions, parse_remote

CHOICE: dict[str, Any] = {
    "name": "t",
    "kind": "choice",
    "prompt": "plain",
    "question": "Q: {{q}}\nA:",
    "choices": "opts",
    "answer": "gold",
    "metrics": ["acc"],
}
ROWS = [
    {"q": f"what is {w}", "opts": ["fox", "the user", "Oslo"], "gold": i % 3}
    for i, w in enumerate(["quick", "brown", "name", "city", "weather", "user"])
]


def write(
    tmp_path: Path, fields: dict[str, Any] = CHOICE, rows: list[dict[str, Any]] = ROWS, name: str = "t"
) -> tuple[Path, Path]:
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / f"{name}.yaml", tmp_path / f"{name}.jsonl"


def test_a_changed_task_file_is_another_evaluation(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    base = {k: v for k, v in CHOICE.items() if k != "answer"}
    task, rows = write(
        tmp_path,
        {
            "include": "base.yaml",
            "task": "t",
            "output_type": "multiple_choice",
            "doc_to_choice": "opts",
            "doc_to_target": "gold",
        },
    )
    assert base
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"doc_to_text": "Q: {{q}}\nA:"}))

    def made() -> tuple[bool, str]:
        assert main(["evaluate", str(pico), str(rows), "--set", f"task={task}", "--json", "--quiet"]) == 0
        told = json.loads(capsys.readouterr().out)
        return told["made"], told["digest"]

    first = made()
    assert made() == (False, first[1])
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"doc_to_text": "Question: {{q}}\nA:"})
    )  # a file that is only included
    again = made()
    assert again[0]
    assert again[1] != first[1]
    assert EvaluateConfig(task=str(task)).definition["question"] == "Question: {{q}}\nA:"


def test_no_row_is_its_own_example_under_another_name() -> None:
    rows = [{**r, "id": str(i)} for i, r in enumerate(ROWS)]
    copies = [{**r, "id": f"c{i}"} for i, r in enumerate(ROWS)]
    for choose in ("same", "first", "each"):
        task = Task(**{**CHOICE, "shots": {"count": 3, "choose": choose}})
        for question in build_questions(task, rows, copies, same_pool=False):
            *examples, asked = question.plain[0].split("\n\n")
            assert len(examples) == 3
            assert not any(e.startswith(asked) for e in examples)
    with pytest.raises(UserError, match="only 0 of the rows to draw examples from differ"):
        build_questions(Task(**{**CHOICE, "shots": {"count": 1}}), rows[:1], [copies[0], copies[0]], same_pool=False)


def test_the_same_file_as_examples_is_the_same_pool(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    task, rows = write(tmp_path, {**CHOICE, "shots": {"count": 6}})
    assert (
        main(["evaluate", str(pico), "--data", str(rows), "--fewshot", str(rows), "--set", f"task={task}", "--quiet"])
        == 2
    )
    assert "there are only 6 rows to draw examples from, including the row itself" in capsys.readouterr().err


def test_digits_of_a_template_are_a_place_and_those_of_a_field_a_text() -> None:
    """As the lm-evaluation-harness reads them."""
    row, choices = {"a": "1", "id": "x"}, ["1", "2", "3"]
    written, field = Task(**{**CHOICE, "answer": "{{a}}"}), Task(**{**CHOICE, "answer": "a"})
    assert gold_indices(row, parse_gold(written, row, render_value("{{a}}", row)), choices) == (1,)
    assert gold_indices(row, parse_gold(field, row, render_value("a", row)), choices) == (0,)
    for bad in ("²", "9" * 5000, "7"):
        with pytest.raises(DataError, match="is not among its 3 choices"):
            gold_indices(row, bad, choices)


def test_fields_are_fields() -> None:
    row = {"id": "7", "list": "[1, 2]", "none": None}
    assert render_value("list", row) == "[1, 2]"
    assert render_value("{{'[1, 2]'}}", row) == [1, 2]
    with pytest.raises(DataError, match="row '7': has no field 'missing'"):
        render("missing", row)
    with pytest.raises(DataError, match="the field 'none' is null"):
        render_string("none", row)
    with pytest.raises(DataError, match="contains a lone surrogate"):
        render_string("q", {"id": "1", "q": "a\ud800"})


@pytest.mark.parametrize(
    "template",
    [
        "{{range(10**9)|list}}",
        "{{2.0**100000}}",
        "{{'x'.encode('nope')}}",
        "{{('a'*60)|regex_replace('(a|aa)+$b','')}}",
        "{{q|regex_replace('(','')}}",
        "{% macro m() %}{{m()}}{% endmacro %}{{m()}}",
        "{{[].__class__}}",
    ],
)
def test_templates_fail_in_one_line(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(DataError, match="cannot be rendered") as caught:
        render(template, {"id": "1", "q": "x"})
    assert "\n" not in str(caught.value)


def test_a_model_of_nan_has_no_score(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.load import load_tokenizer

    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    model = load_model(pico)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(pico).save_pretrained(tmp_path / "broken")
    task, rows = write(tmp_path)
    assert (
        main(["evaluate", str(tmp_path / "broken"), str(rows), "--set", f"task={task}", "--quiet"])
        == ModelError("").exit_code
    )
    assert "returns NaN" in capsys.readouterr().err


def test_rows_without_a_group_are_their_own() -> None:
    assert sum_by_group([[1.0], [2.0], [3.0], [4.0]], ["", "a", "a", ""]).tolist() == [[1.0], [5.0], [4.0]]


def test_a_refused_question_is_never_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    server = Loopback()
    server.behaviours = [says({"error": {"message": "no"}}, 400)]
    task, rows = write(
        tmp_path,
        {"name": "g", "question": "{{q}}", "answer": "{{a}}", "metrics": ["exact_match"]},
        [{"q": "x", "a": ""}, {"q": "yy", "a": "to yy"}],
    )
    assert (
        main(["evaluate", f"{server.url}#m?concurrency=1", str(rows), "--set", f"task={task}", "--json", "--quiet"])
        == 0
    )
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert (metrics["score"], metrics["refused"]) == (0.5, 1)
    server.stop()


def test_keys_stand_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server = Loopback()
    for status in (400, 401, 403):
        server.behaviours = [says({"error": {"message": "bad header: Bearer sk-very-secret"}}, status)]
        engine = RemoteEngine(server.url, "m", RemoteOptions(key="MY_KEY", retries=0))
        with pytest.raises(LlmworksError) as caught:
            engine.generate([Request((Message("user", "x"),))])
        assert "sk-very-secret" not in str(caught.value)
        assert "(the key)" in str(caught.value)
        engine.close()
    server.stop()
    for ref, message in (
        ("http://user:pw@h/v1#m", "a URL with a password"),
        ("http://h/v1#m?key=sk-very-secret", "is the name of an environment variable"),
        ("http://h:abc/v1#m", "not a valid URL"),
        ("http://[::1/v1#m", "not a valid URL"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            parse_remote(ref)
        assert "pw@" not in str(refused.value)
        assert "sk-very" not in str(refused.value)
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(UserError, match="contains non-ASCII characters"):
        RemoteEngine("http://127.0.0.1:9/v1", "m", RemoteOptions(key="MY_KEY"))


def test_odd_replies(tmp_path: Path) -> None:
    server = Loopback()
    engine = RemoteEngine(server.url, "m", RemoteOptions(retries=0))
    deep = b"[" * 100_000
    for content, headers in (
        (b"\x1f\x8bbroken", {"content-encoding": "gzip"}),
        (deep, {}),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e400}}', {}),
    ):
        server.behaviours = [says(content, 200, headers)]
        with pytest.raises(EngineError):
            engine.generate([Request((Message("user", "x"),))])
    server.behaviours = [
        says({"choices": [{"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}]})
    ]
    done = engine.generate([Request((Message("user", "x"),))])[0]
    assert (done.text, done.finish) == ("I will not.", "filtered")
    engine.close()
    server.stop()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "extract of a number": ({**CHOICE, "kind": "generate", "metrics": ["exact_match"], "extract": {"a": 5}}, "extract"),
    "no way to extract": (
        {**CHOICE, "kind": "generate", "metrics": ["exact_match"], "extract": {}},
        "extract is empty",
    ),
    "a broken pattern": (
        {**CHOICE, "kind": "generate", "metrics": [{"name": "exact_match", "ignore": ["("]}]},
        "is not a valid regular expression",
    ),
    "an include of itself": ({"task": "t", "include": "t.yaml"}, "includes itself"),
    "an include of a number": ({"task": "t", "include": 5}, "include must be a file name"),
    "odd generation": (
        {"task": "t", "output_type": "generate_until", "doc_to_text": "q", "generation_kwargs": 5},
        "is not a readable lm-evaluation-harness task",
    ),
    "odd metrics": (
        {"task": "t", "doc_to_text": "q", "metric_list": ["acc"]},
        "is not a readable lm-evaluation-harness task",
    ),
    "odd filters": (
        {"task": "t", "doc_to_text": "q", "filter_list": ["regex"]},
        "is not a readable lm-evaluation-harness task",
    ),
    "odd shots": (
        {"task": "t", "doc_to_text": "q", "num_fewshot": "abc"},
        "is not a readable lm-evaluation-harness task",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_odd_files_are_said_in_one_line(what: str, tmp_path: Path) -> None:
    fields, message = WRONG[what]
    file, _ = write(tmp_path, fields)
    with pytest.raises(UserError, match=message) as caught:
        load_task(str(file))
    assert "\n" not in str(caught.value)


def test_conversations_in_a_plain_prompt_are_refused(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    assert main(["evaluate", str(pico), "--set", "task=function-call", "--set", "prompt_format=plain", "--quiet"]) == 2
    assert "conversations without `question` need kind generate and prompt chat" in capsys.readouterr().err


def test_one_model_that_is_gone_does_not_take_the_board_with_it(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    file, rows = write(tmp_path)
    fields = {**CHOICE, "data": str(rows)}
    write(tmp_path, fields)
    generated, _ = write(
        tmp_path,
        {
            "name": "g",
            "question": "{{q}}",
            "answer": "{{gold}}",
            "metrics": ["exact_match"],
            "data": str(rows),
            "max_tokens": 3,
        },
        name="g",
    )
    assert (
        main(
            [
                "autoeval",
                str(pico),
                "http://127.0.0.1:9/v1#dead?retries=0",
                "--suite",
                f"{file},{generated}",
                "--quiet",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert len(told["scores"]) == 2
    assert {m["model"] for m in told["failures"]} == {"dead"}
