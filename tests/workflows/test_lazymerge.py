"""A merge in one line: the YAML that it writes is mergekit's, its card is one that the Hub reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from llmworks.cli import main
from llmworks.core.errors import UserError
from llmworks.merge.plan.catalogue import METHODS
from llmworks.workflows.lazymerge import build_merge_config


def test_every_method_has_a_beginning() -> None:
    """With as many models as it takes."""
    for method, how in METHODS.items():
        if method == "passthrough":
            continue
        models = ["a", "b", "c"] if how.min_models > 2 or (how.max_models or 9) > 2 else ["b"]
        models = models[
            : (
                how.max_models - 1
                if how.max_models and how.base == "required"
                else how.max_others or how.max_models or 9
            )
        ]
        config = build_merge_config(
            method, ["base", *models] if len(models) < 2 else models, "base" if how.base == "required" else ""
        )
        named = config.model_names()
        assert how.min_models <= len(named) <= (how.max_models or 9)
    assert build_merge_config("ties", ["a", "b"], "base").models[0].parameters == {"weight": 0.5, "density": 0.5}  # type: ignore[index]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ties", ["a", "b"]), "give it as --base"),
        (("linear", ["a"]), "two models or more"),
        (("passthrough", ["a", "b"]), "write its slices"),
    ],
)
def test_what_it_cannot_have(given: tuple[str, list[str]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_merge_config(*given)
    with pytest.raises(UserError, match="1 numbers for 2 models"):
        build_merge_config("linear", ["a", "b"], weights=[1.0])


def test_from_the_command_line(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, factor in (("base", 1.0), ("one", 1.02), ("two", 0.97)):
        shutil.copytree(pico, tmp_path / name)
        tensors = load_file(pico / "model.safetensors")
        save_file(
            {key: one * factor for key, one in tensors.items()},
            tmp_path / name / "model.safetensors",
            metadata={"format": "pt"},
        )
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "ask": f"What is {i}?", "options": ["one", "two"], "right": i % 2}) + "\n"
            for i in range(5)
        )
    )
    (tmp_path / "task.yaml").write_text(
        f"name: tiny\nwhat: two answers\nkind: choice\ndata: {tmp_path}/rows.jsonl\nprompt: plain\nquestion:"
        ' "{{ask}}"\nchoices: "{{options}}"\nanswer: "{{right}}"\nmetrics: [acc]\n'
    )
    monkeypatch.chdir(tmp_path)
    words = [
        "lazymerge",
        "--models",
        "one",
        "two",
        "--base",
        "base",
        "--method",
        "task_arithmetic",
        "--suite",
        "task.yaml",
        "--out",
        "child",
        "--export",
        "upload",
        "--quiet",
        "--workspace",
        "ws",
    ]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "merge_method: task_arithmetic" in told.err
    assert sorted(line.split()[0] for line in told.out.splitlines() if " to " in line) == [
        "base",
        "child",
        "one",
        "two",
    ]
    assert told.err.count("task.yaml" if "task.yaml" in told.err else "tiny") >= 4
    card = ModelCard.load(tmp_path / "upload" / "README.md")
    card.validate = lambda *_: None  # type: ignore[method-assign]  # which asks the Hub
    assert card.data.tags == ["merge", "mergekit", "task_arithmetic"]
    assert card.data.eval_results
    assert card.data.eval_results[0].dataset_name == "tiny"
    assert "| tiny |" in card.text
    merged = load_file(tmp_path / "upload" / "model.safetensors")
    parents = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "two")]
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(
        merged[key],
        parents[0][key] + 0.5 * (parents[1][key] - parents[0][key]) + 0.5 * (parents[2][key] - parents[0][key]),
        atol=1e-6,
    )
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err
