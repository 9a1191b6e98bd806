"""Recipes are checked wholly before anything runs: one line per mistake, with file and line, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmworks.core.artifact import Dataset
from llmworks.core.errors import RecipeError, UserError
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.recipe import GateStep, StageStep, check_gate
from llmworks.runtime.recipe_schema import build_recipe_schema

GOOD = """\
name: try
steps:
  raw: {use: "asset:bfcl-simple"}
  chats:
    stage: data.chat
    inputs: {data: raw}
    config: {format: bfcl}
  train:
    stage: data.split
    inputs: {data: chats}
    config: {split: train}
"""


def problems(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return [p.removeprefix(f"{file}:") for p in caught.value.problems]


def test_good_recipe_and_override(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    recipe = load_recipe(file, ["train.fold=3"])
    step = recipe.steps["train"]
    assert isinstance(step, StageStep)
    assert step.config.model_dump()["fold"] == 3
    assert list(recipe.steps) == ["raw", "chats", "train"]


def test_steps_are_ordered_by_need(tmp_path: Path) -> None:
    head, _, tail = GOOD.partition("  raw:")
    raw, _, rest = tail.partition("\n")
    file = tmp_path / "r.yaml"
    file.write_text(f"{head}{rest}  raw:{raw}\n")
    assert list(load_recipe(file).steps) == ["raw", "chats", "train"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("data.chat", "data.chta", 5, ["unknown stage 'data.chta'", "did you mean 'data.chat'"]),
        ("format: bfcl", "fromat: bfcl", 7, ["unknown key 'fromat'", "did you mean 'format'"]),
        ("format: bfcl", "format: 7", 7, ["chats.config.format", "got 7"]),
        ("split: train", "split: train, fold: x", 11, ["train.config.fold", "valid integer"]),
        ("split: train", "split: train, n_splits: 2, fold: 2", 11, ["fold must be smaller"]),
        ("{data: chats}", "{data: chast}", 10, ["unknown step 'chast'", "did you mean 'chats'"]),
        ("{data: chats}", "{date: chats}", 10, ["unknown key 'date'", "did you mean 'data'"]),
        ("{data: chats}", "{data: [chats]}", 10, ["must be a step name"]),
        ("asset:bfcl-simple", "asset:bfcl-simpel", 3, ["unknown asset 'bfcl-simpel'", "did you mean 'bfcl-simple'"]),
        ("asset:bfcl-simple", "asset:smollm2-135m-instruct", 6, ["'raw' is a model, expected dataset"]),
        ("asset:bfcl-simple", "bfcl-simple", 3, ["is not a valid reference"]),
        ("asset:bfcl-simple", "path:no/such", 3, ["no such file"]),
        ("inputs: {data: raw}", "inputs: {data: train}", 4, ["circular dependency", "chats", "train"]),
        ("    stage: data.split\n", "", 8, ["exactly one of `use`, `stage`, `gate`"]),
        ("name: try", "nmae: try", 1, ["unknown key 'nmae'", "did you mean 'name'"]),
        ("name: try", "name: store", 1, ["not a valid name for a workspace folder"]),
        ("name: try", "seed: x", 1, ["seed"]),
        ("split: train", "split: train, split: test", 11, ["duplicate key"]),
        ("steps:", "steps: [", 2, ["not YAML"]),
        ("name: try", "name: ..", 1, ["not a valid name for a workspace folder"]),
        ("stage: data.split", "stage: [a]", 9, ["unknown stage"]),
        ("name: try", "name: 2024-31-12", 1, ["cannot be read as a recipe"]),
        ("name: try", "? [a]\n: 1", 1, ["cannot be read as a recipe"]),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, old: str, new: str, line: int, words: list[str]) -> None:
    assert old in GOOD
    found = problems(tmp_path, GOOD.replace(old, new, 1))
    text = "\n".join(found)
    assert all(word in text for word in words), text
    if "not YAML" not in text:
        assert any(f.startswith(f"{line}:") for f in found), text
    assert all("\n" not in f for f in found)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace("fomat", "x")
        .replace("data.split", "data.splt")
        .replace("format: bfcl", "frmat: bfcl")
        .replace("asset:bfcl-simple", "asset:nope")
    )
    assert len(problems(tmp_path, text)) == 3


@pytest.mark.parametrize(
    "override", ["train.fold", "fold=1", "trian.fold=1", "train.fodl=1", "train.split.x=1", "train.fold=[q"]
)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert len(problems(tmp_path, GOOD, (override,))) == 1


def test_gate_needs_a_bound_and_a_step(tmp_path: Path) -> None:
    assert "at least one of above" in problems(tmp_path, GOOD + "  g: {gate: chats, metric: rows}\n")[0]
    gates = "  g: {gate: chats, metric: rows, above: 1}\n  h: {gate: g, metric: rows, above: 1}\n"
    assert "'g' is itself a gate" in problems(tmp_path, GOOD + gates)[0]
    assert "unknown step 'chat'" in problems(tmp_path, GOOD + "  g: {gate: chat, metric: rows, above: 1}\n")[0]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"- a\n"])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(caught.value.problems) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_shipped_recipes_are_valid_and_fit_the_schema() -> None:
    import jsonschema_rs
    import yaml

    schema = build_recipe_schema()
    validator = jsonschema_rs.Draft202012Validator(schema)  # which checks the schema
    for file in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        load_recipe(file)
        validator.validate(yaml.safe_load(file.read_text()))
    broken = yaml.safe_load(GOOD.replace("format: bfcl", "frmat: bfcl"))
    with pytest.raises(jsonschema_rs.ValidationError):
        validator.validate(broken)


@pytest.mark.parametrize(
    ("bound", "below", "equal", "above"),
    [
        ("above", False, False, True),
        ("below", True, False, False),
        ("at_least", False, True, True),
        ("at_most", True, True, False),
    ],
)
def test_what_a_gate_lets_through(bound: str, below: bool, equal: bool, above: bool, tmp_path: Path) -> None:
    gate = GateStep("g", "step", "loss", {bound: 0.5}, "")
    found = [check_gate(gate, Dataset(tmp_path, metrics={"loss": value})) for value in (0.4, 0.5, 0.6)]
    assert [holds for holds, _ in found] == [below, equal, above]
    assert found[0][1] == f"step.loss is 0.4, required {bound.replace('_', ' ')} 0.5"
    with pytest.raises(UserError, match="gate g: step has no metric 'loss'; it has rows"):
        check_gate(gate, Dataset(tmp_path, metrics={"rows": 1, "loss": True}))
