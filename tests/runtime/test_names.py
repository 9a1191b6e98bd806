"""Configs in the names of TRL, peft, llm-compressor and lm-eval become valid by what the error messages say."""

from __future__ import annotations

import json
import re
import typing
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmworks.core.artifact import Artifact, Config
from llmworks.core.errors import DataError, UserError
from llmworks.runtime.names import find_field, names
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.session import Session, validate
from llmworks.runtime.stages import STAGES

FILES = Path(__file__).parents[1] / "fixtures" / "names"
TAKEN: set[tuple[str, str, str]] = set()
PLACE = re.compile(r"^[\w.]+?\.config(?:\.(?P<inner>[\w.]+?))?: unknown key '(?P<key>\w+)'(?P<rest>.*)$")


def follow(stage: str, config: dict[str, Any]) -> tuple[Config, list[str]]:
    """Do what each message says until a configuration is valid; returns it, and every message that was needed."""
    seen: list[str] = []
    for _ in range(12):
        try:
            return validate(resolve_stage(stage), config), seen
        except UserError as error:
            messages = str(error).splitlines()
        seen += messages
        for message in messages:
            obey(message, config)
    raise AssertionError(messages)


def at(config: dict[str, Any], path: str) -> dict[str, Any]:
    for part in filter(None, path.split(".")):
        config = config.setdefault(part, {})
    return config


def obey(message: str, config: dict[str, Any]) -> None:
    """Do what one message says."""
    if " is missing (" in message:  # the message on the key that was written instead says what to do
        return
    if found := PLACE.match(message):
        inner = at(config, found["inner"] or "")
        value = inner.pop(found["key"], None)
        if better := re.search(r"did you mean '([\w.]+)(?:: (\w+))?'\?", found["rest"]):
            place, _, name = better[1].rpartition(".")
            at(inner, place).setdefault(name, yaml.safe_load(better[2]) if better[2] else value)
        elif under := re.search(r"put its fields under `(\w+)`", found["rest"]):
            inner[under[1]] = value
        else:
            assert found["rest"].startswith(": "), message  # an advice, not the list of all fields
        return
    path, _, what = message.partition(": ")
    place, _, name = path.partition(".config.")[2].rpartition(".")
    inner = at(config, place)
    if better := re.search(r"did you mean '(.+)'\?$|; use (.+)$", what):
        for part in re.split(r" with | and ", better[1] or better[2]):
            key, colon, value = part.partition(": ")
            inner[key if colon else name] = yaml.safe_load(value if colon else part)
    else:
        inner[name] = re.findall(r"'([\w.-]+)'", what)[0]  # the first of the values that are listed


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("sft", "train.sft"),
        ("dpo", "align.dpo"),
        ("grpo", "align.grpo"),
        ("gptq", "quantize.gptq"),
        ("evaluate", "evaluate"),
    ],
)
def test_a_foreign_config_runs(file: str, stage: str, tmp_path: Path, pico: Path, chat_file: Path) -> None:
    """The messages alone lead to a config that is accepted and runs; every setting that has a field here is kept."""
    config = yaml.safe_load((FILES / f"{file}.yaml").read_text())
    if stage == "evaluate":  # tasks of the Hub are not at hand: one's own in a file takes their place
        task = {"task": "mine", "dataset_path": "json", **config["task_config"]}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
        config["tasks"] = str(tmp_path / "mine.yaml")
        with pytest.raises(UserError, match=r"mine.yaml.*doc_to_choice"):
            validate(resolve_stage(stage), {"task": config["tasks"]})
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**task, "doc_to_choice": "{{choices}}"}))
    made, messages = follow(stage, config)
    assert len(messages) <= 26, messages
    kept = made.model_dump()
    assert kept == {**resolve_stage(stage).config.model_validate(config).model_dump()}
    wanted = {
        "sft": {"gradient_accumulation_steps": 2, "max_length": 128, "eval_steps": 2, "neftune_noise_alpha": 5.0},
        "dpo": {"beta": 0.1, "rpo_alpha": 1.0, "ld_alpha": 0.5, "precompute_ref_log_probs": True},
        "grpo": {"num_generations": 2, "epsilon_high": 0.28, "delta": 2.0, "loss_aggregation": "token-mean"},
        "gptq": {"bits": 4, "group_size": 32, "symmetric": True, "num_calibration_samples": 4, "max_seq_length": 128},
        "evaluate": {"num_fewshot": 2, "limit": 4},
    }[file]
    assert wanted.items() <= kept.items()
    if file in ("sft", "dpo", "grpo"):
        assert (kept["lora"]["r"], kept["lora"]["lora_alpha"], kept["batch_size"]) == (8, 16.0, 2)
        assert kept["optimizer"]["max_grad_norm"] == config["optimizer"]["max_grad_norm"]
    session = Session(tmp_path / "workspace", quiet=True)
    inputs = make_inputs(stage, session, tmp_path, chat_file)
    if stage.startswith("align"):
        with pytest.raises(UserError, match="no input 'model'; did you mean 'policy'"):
            session.make(stage, config=made, model=pico, **inputs)
    model = "policy" if stage.startswith("align") else "model"
    if stage == "align.grpo":  # TRL's trainer takes them as an argument
        with pytest.raises(DataError, match="set other reward_funcs"):
            session.make(stage, config=made, policy=pico, **inputs)
        made = validate(resolve_stage(stage), {**config, "reward_funcs": {"length": 1.0}})
    with pytest.raises(UserError, match="eval_data") if getattr(made, "eval_steps", 0) else nullcontext():
        session.make(stage, config=made, **{model: pico}, **inputs)
    held_out = {"eval_data": next(iter(inputs.values()))} if "eval_data" in resolve_stage(stage).inputs else {}
    result = session.make(stage, config=made, **{model: pico}, **inputs, **held_out)
    assert result.path.is_dir()


def make_inputs(stage: str, session: Session, folder: Path, chat_file: Path) -> dict[str, Artifact]:
    """Rows of the kind that the stage takes."""
    if stage == "evaluate":
        rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(8)]
        (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data": session.load(folder / "choices.jsonl")}
    if stage != "align.dpo":
        if stage == "quantize.gptq":  # calibration takes more than the twelve short conversations
            text = chat_file.read_text()
            chat_file.write_text("".join(text.replace('"rain', f'"{i} {"rain " * 60}') for i in range(20)))
        return {"data": session.make("data.chat", data=chat_file)}
    pairs = [
        {"prompt": line["messages"][0]["content"], "chosen": "rain", "rejected": line["messages"][1]["content"]}
        for line in map(json.loads, chat_file.read_text().splitlines())
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return {"pairs": session.make("data.chat", data=folder / "pairs.jsonl")}


def collect_configs(model: type[Config], found: set[type[Config]]) -> None:
    """Add a config class and those within it to `found`."""
    found.add(model)
    for field in model.model_fields.values():
        parts: list[Any] = [field.annotation]
        while parts:
            part = parts.pop()
            parts += typing.get_args(part)
            if isinstance(part, type) and issubclass(part, Config) and part not in found:
                collect_configs(part, found)


def test_every_field_has_its_origin() -> None:
    """`names.yaml` is complete: each config field is in it once, and nothing else is."""
    listed = [field for library in names()["fields"].values() for field in library]
    assert len(listed) == len(set(listed))
    classes: set[type[Config]] = set()
    for stage in STAGES:
        collect_configs(resolve_stage(stage).config, classes)
    assert set(listed) == {field for model in classes for field in model.model_fields}
    stages = names()["stages"]
    assert set(stages) <= set(STAGES)
    assert not {row["was"] for row in stages.values() if "was" in row} & set(STAGES)
    inputs = {name for stage in STAGES for name in resolve_stage(stage).inputs}
    assert set(names()["inputs"]) <= inputs


def test_an_old_name_is_no_other_field_of_its_config() -> None:
    """A config written before 0.3 is answered, never read with another meaning."""
    rows = {field: row for library in names()["fields"].values() for field, row in library.items()}
    classes: set[type[Config]] = set()
    for stage in STAGES:
        collect_configs(resolve_stage(stage).config, classes)
    taken = {
        (model.__name__, old, field)
        for model in classes
        for field in model.model_fields
        for old in rows[field].get("was", ())
        if old in model.model_fields
    }
    assert taken == TAKEN


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("accumulation", {"gradient_accumulation_steps": "gradient_accumulation_steps"}, "gradient_accumulation_steps"),
        ("clip", {"epsilon": "epsilon", "max_grad_norm": "optimizer.max_grad_norm"}, "epsilon"),
        ("clip", {"max_grad_norm": "optimizer.max_grad_norm"}, "optimizer.max_grad_norm"),
        ("learn", {"cpo_alpha": "cpo_alpha"}, "cpo_alpha"),
        ("nothing", {"cpo_alpha": "cpo_alpha"}, ""),
    ],
)
def test_the_nearest_meaning_counts(name: str, known: dict[str, str], found: str) -> None:
    assert find_field(name, known) == found


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_metrics_of_gates_are_listed(recipe: Path) -> None:
    steps = yaml.safe_load(recipe.read_text()).get("steps", {}) if recipe.stem != "weather" else {}
    metrics = {step["metric"] for step in steps.values() if "gate" in step}
    tasks_of_their_own = {"wordsim353", "languages-bpe_lost"}  # NAME_metric of an input that the recipe names
    assert metrics - tasks_of_their_own <= set(names()["metrics"])
