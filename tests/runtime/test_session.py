"""The Python API: the page's own lines run, what is given wrongly is named in one line, importing costs no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_pico

import llmworks
from llmworks import (
    Adapter,
    ArtifactError,
    Dataset,
    Message,
    Model,
    Report,
    Request,
    RequestError,
    Session,
    UserError,
    assets,
)
from llmworks.data.chat import ChatConfig

PART = {"split": "test", "n_splits": 3}
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """The pico model with positions for a function's schema."""
    place = make_pico(tmp_path / "wide")
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        values = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**values, key: 2048}))
    return place


def few_questions(out: Path, count: int = 10) -> Path:
    """The first rows of BFCL's files, which lie side by side."""
    source = assets.fetch("bfcl-simple")
    shutil.copytree(source, out)
    for file in out.glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    return out


def test_the_page_runs(
    tmp_path: Path,
    wide: Path,
    recipe_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All lines of docs/python.md, on a small model, few questions and a small recipe."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file(num_train_epochs=1)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n{"prompt": "What is rain?"}\n')
    names: dict[str, Any] = {}
    for block in blocks:
        exec(
            block.replace("recipes/quickstart.yaml", str(recipe))
            .replace("recipes/weather.json", str(DOCS.parent / "recipes" / "weather.json"))
            .replace("asset:smollm2-135m-instruct", str(wide))
            .replace("asset:everyday-prompts", str(prompts))
            .replace('"max_tokens": 160', '"max_tokens": 8, "truncated": "keep"')
            .replace("asset:bfcl-simple", str(few_questions(tmp_path / f"q{len(names)}")))
            .replace('"num_train_epochs": 1', '"num_train_epochs": 1, "num_sample_prompts": 1'),
            names,
        )
    said = capsys.readouterr().out
    assert (names["chats"].metrics["rows"], names["test"].metrics["rows"]) == (10, 3)
    assert isinstance(names["tuned"], Adapter)
    assert names["small"].gguf_path.exists()
    assert (tmp_path / "small").is_symlink()
    assert "data.split.config.split: Input should be 'train' or 'test' (got 'trian')" in said
    again = names["session"].make(
        "train.sft",
        kind=Adapter,
        model=names["base"],
        data=names["mixed"],
        eval_data=names["test"],
        config={**names["fields"], "num_sample_prompts": 1},
    )
    assert again.digest == names["tuned"].digest


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("data.splt", {}, "unknown stage 'data.splt', did you mean 'data.split'"),
        ("data.split", {"data": "rows", "config": {"prat": "test"}}, "did you mean 'split'"),
        ("data.split", {"config": PART}, "--data (dataset) is missing"),
        ("data.split", {"date": "rows", "config": PART}, "data.split has no input 'date'; inputs: data"),
        ("data.chat", {"data": "rows", "format": "bfcl"}, "no input 'format'; it is a field: config={'format': ...}"),
        ("data.split", {"data": None, "config": PART}, "data.split: data is None; it takes dataset"),
        (
            "data.split",
            {"data": "rows", "config": "test"},
            "config takes a mapping of fields or SplitConfig, not 'test'",
        ),
        ("data.split", {"data": "rows", "config": ChatConfig()}, "or SplitConfig, not ChatConfig("),
        ("train.sft", {"config": {"lr": 1}}, "unknown key 'lr', did you mean 'optimizer.learning_rate'?"),
        ("train.sft", {"config": {"learning_rte": 1}}, "did you mean 'optimizer.learning_rate'?"),
        ("data.split", {"data": ["rows"], "config": PART}, "data.split: data takes dataset, got a list"),
        ("data.split", {"data": "pico", "config": PART}, "--data: pico is a model, expected dataset"),
        ("data.split", {"data": "nowhere", "config": PART}, "nowhere: no such file or directory"),
        ("data.split", {"data": "rows", "kind": Model, "config": PART}, "data.split makes a dataset, kind is model"),
    ],
)
def test_what_is_given_wrongly(
    stage: str, given: dict[str, Any], said: str, tmp_path: Path, pico: Path, chat_file: Path
) -> None:
    session = Session(tmp_path / "ws", quiet=True)
    found = {"rows": session.make("data.chat", data=str(chat_file)), "pico": str(pico)}

    def real(value: Any) -> Any:
        return [real(v) for v in value] if isinstance(value, list) else found.get(value, value)

    words = {key: value if key in ("config", "kind") else real(value) for key, value in given.items()}
    if "pico" in given.values():
        said = said.replace("pico", pico.name)
    with pytest.raises((UserError, ArtifactError), match=re.escape(said)):
        session.make(stage, **words)


@pytest.mark.parametrize("messages", ["hi", Message("user", "hi"), ("hi",), ({"role": "user", "content": "hi"},)])
def test_a_request_takes_messages(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages takes a tuple of Message, not "):
        Request(messages)


def test_inputs_of_every_shape(tmp_path: Path, chat_file: Path) -> None:
    """Artifacts, paths and references; lists and mappings; `at` makes elsewhere and finds names here."""
    session = Session(tmp_path / "ws", quiet=True)
    rows = session.make("data.chat", kind=Dataset, data=chat_file, out=tmp_path / "ws" / "named")
    mixed = session.make("data.mix", kind=Dataset, data={"a": rows, "b": "named"}, config={"weights": {"a": 1, "b": 1}})
    page = session.make("lineage.report", kind=Report, artifacts=[rows, mixed], config={"title": "t", "subtitle": "l"})
    assert (page.path / "report.html").exists()
    aside = session.with_workspace(tmp_path / "aside").make(
        "data.split", data="named", config={"split": "test", "n_splits": 3}
    )
    assert aside.path.is_relative_to(tmp_path / "aside")
    assert session.load("named").digest == rows.digest


def test_the_public_face() -> None:
    """Every public name is there, documented, and imports no torch before it is used."""
    assert set(llmworks.__all__) <= set(dir(llmworks))
    assert llmworks.__version__.count(".") == 2
    for name in llmworks.__all__:
        assert getattr(llmworks, name).__doc__, name
    code = (
        "import sys, llmworks\nfor name in llmworks.__all__: getattr(llmworks, name)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, llmworks\nassert not {'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llmworks.nothing  # noqa: B018
    assert subprocess.run([sys.executable, "-m", "llmworks", "--version"], check=True, capture_output=True).stdout
    page = (DOCS / "python.md").read_text()
    assert all(
        f"`{name}" in page for name in ("run(", "Session(", "Session.make(", "Session.load(", "load(", "open_engine(")
    )
