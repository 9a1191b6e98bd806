"""The page of a family: every evaluation with its own answers, whatever its task."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llmworks import Report, Session
from llmworks.core.report import ReportBuilder
from llmworks.data.store.rows import write_chat
from llmworks.lineage.report import add_forgetting
from tests.conftest import make_pico

CHOICE = {
    "name": "letters",
    "kind": "choice",
    "question": "{{question}}",
    "choices": "{{choices}}",
    "answer": "{{answer}}",
    "metrics": ["acc", "brier_score"],
}
TEXT = {"name": "stories", "kind": "perplexity", "question": "{{question}}", "metrics": ["word_perplexity"]}


def test_evaluations_of_several_tasks(tmp_path: Path, pico: Path) -> None:
    """Answers of one task are side by side; an evaluation without completions has its score and no speed."""
    session = Session(tmp_path / "workspace", quiet=True)
    rows = [{"question": f"question {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (CHOICE, TEXT):
        (tmp_path / f"{task['name']}.yaml").write_text(json.dumps(task))
    chats = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Hi"}]}
        for i in range(5)
    ]
    write_chat(tmp_path / "chats", chats)
    models = {"first": pico, "second": make_pico(tmp_path / "second", seed=1)}
    made: dict[str, dict[str, Report]] = {}
    for task, data, fields in (
        (str(tmp_path / "letters.yaml"), tmp_path / "rows.jsonl", {}),
        (str(tmp_path / "stories.yaml"), tmp_path / "rows.jsonl", {}),
        ("everyday", tmp_path / "chats", {"max_tokens": 4}),
    ):
        made[Path(task).stem] = {
            name: session.make("evaluate", kind=Report, model=model, data=data, config={"task": task, **fields})
            for name, model in models.items()
        }
    changes = [session.make("evaluate.compare", before=pair["first"], after=pair["second"]) for pair in made.values()]
    artifacts = [*(one for pair in made.values() for one in pair.values()), *changes]
    page = session.make("lineage.report", kind=Report, artifacts=artifacts)
    text = (page.path / "report.md").read_text()
    answers = {sample["text"] for one in made["everyday"].values() for sample in one.read()["samples"]}
    assert len(answers) == 10
    shown = re.sub(r"\W", "", text.partition("## Samples: everyday")[2])  # without the marks of Markdown
    assert all(re.sub(r"\W", "", answer) in shown for answer in answers)
    assert "✓" in text.partition("## Samples: letters")[2].partition("##")[0]
    assert "Samples: stories" not in text  # a perplexity has no answers
    for task, pair in made.items():
        for one in pair.values():
            form = ".4g" if task == "stories" else ".1%"
            assert f"| {one.name} | {task} |" in text
            assert f"| {one.metrics['score']:{form}} | {one.metrics['low']:{form}} to" in text
    assert f"{changes[1].metrics['difference']:+.4g}" in text


def test_forgetting_is_on_the_page(tmp_path: Path, pico: Path) -> None:
    """What a training measured beside its task is a row of the page."""
    session = Session(tmp_path / "workspace", quiet=True)
    trained = session.make("model.new", tokenizer=pico, config={"hidden_size": 32, "num_hidden_layers": 1})
    assert trained.manifest is not None
    page = ReportBuilder()
    add_forgetting(page, [trained])
    assert page.blocks == []
    trained.manifest.metrics.update(general_kl=0.1104, general_top1_agreement=0.89)
    add_forgetting(page, [trained])
    trained.manifest.metrics.update(general_same_start=0.75, general_degenerate=0.0, general_degenerate_before=0.125)
    add_forgetting(page, [trained])
    assert [block.rows for block in page.blocks] == [
        ((trained.name, "0.110", "89.0%", "", "", ""),),
        ((trained.name, "0.110", "89.0%", "75%", "12%", "0%"),),
    ]
