"""Cards of models: carried from step to step, whatever the step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import make_pico

from llmworks.cli import main
from llmworks.core.artifact import Adapter, Manifest, Model, Parent
from llmworks.model.card import complete_card, get_base_model_fields, get_hub_names
from llmworks.runtime.session import load


def head(path: Path) -> dict[str, Any]:
    """Of a card, which must begin with one."""
    text = (path / "README.md").read_text()
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture
def licensed(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pico, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/before\n---\n# base\n"
    )
    return tmp_path / "base"


def test_every_step_has_a_card_and_verifies(licensed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps from the licence it is still there; a card is made again to the byte."""
    other = make_pico(tmp_path / "other", seed=3)
    for words in (
        ["quantize", "rotate", str(licensed), "--out", "once"],
        ["quantize", "rotate", "once", "--out", "twice"],
        ["merge", "extract", str(other), "once", "--out", "difference"],
        ["merge", "adapter", "difference", "once", "--out", "folded"],
        ["quantize", "rtn", "folded", "--set", "group_size=32", "--out", "small"],
    ):
        assert main([*words, "--quiet"]) == 0, words
    for name, library, tag in (
        ("once", "transformers", "rotate"),
        ("twice", "transformers", "rotate"),
        ("difference", "peft", "extract"),
        ("folded", "transformers", "adapter"),
    ):
        found = head(tmp_path / name)
        assert (found["license"], found["language"], found["library_name"], found["tags"]) == (
            "apache-2.0",
            ["en"],
            library,
            [tag],
        ), name
    assert head(tmp_path / "small")["license"] == "apache-2.0"
    capsys.readouterr()
    assert main(["verify", "folded"]) == 0
    assert "✗" not in capsys.readouterr().out


def test_a_head_is_put_before_a_card_without_one(tmp_path: Path, pico: Path) -> None:
    """And not into the file that it is another name of; a card that has one stays."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "README.md").write_text("# An adapter beside weights in 4 bits\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").hardlink_to(tmp_path / "first" / "README.md")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    base: Any = load(str(pico))
    complete_card(tmp_path / "out", Adapter(tmp_path / "out"), {"model": base}, "train.sft")
    made = (tmp_path / "out" / "README.md").read_text()
    assert head(tmp_path / "out")["library_name"] == "peft"
    assert made.endswith("---\n# An adapter beside weights in 4 bits\n")
    assert (tmp_path / "first" / "README.md").read_text() == "# An adapter beside weights in 4 bits\n"
    complete_card(tmp_path / "out", Adapter(tmp_path / "out"), {}, "train.sft")
    assert (tmp_path / "out" / "README.md").read_text() == made


def test_what_the_hub_calls_a_model_is_known_two_steps_on(tmp_path: Path, pico: Path) -> None:
    """Of what was made here its card says it; a foreign directory's card says what that was made of, which it is
    not.
    """
    shutil.copytree(pico, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nbase_model: [HuggingFaceTB/SmolLM2-135M-Instruct]\n---\n")
    foreign = Model(tmp_path / "m")
    assert get_hub_names(foreign) == []
    parent = Parent(role="model", name="x", kind="model", digest="0" * 64, ref="")
    made = Model(tmp_path / "m", manifest=Manifest.model_construct(parents=[parent]))
    assert get_base_model_fields([made], "finetune") == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
    }
    direct = Model(
        tmp_path / "m",
        manifest=Manifest.model_construct(
            parents=[Parent(role="model", name="x", kind="model", digest="0" * 64, ref="asset:smollm2-135m-instruct")]
        ),
    )
    assert get_hub_names(direct) == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
