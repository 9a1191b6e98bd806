"""Load the dataset that a task names and its few-shot dataset, converted where the task reads conversations."""

from __future__ import annotations

from typing import Any, Protocol

from llmworks.core.artifact import Artifact, Config, Dataset
from llmworks.core.errors import UserError
from llmworks.data.store.rows import detect_full_schema
from llmworks.evaluate.protocol.load_task import load_task, validate_task
from llmworks.evaluate.protocol.task import Task


class LoadReference(Protocol):
    """Resolver of references, see `runtime.session.Session.load`."""

    def __call__(self, ref: Artifact | str, *, schema: str = "", format: str = "") -> Artifact:
        """Load the artifact, converted to `schema`."""
        ...


def task_inputs(config: Config, inputs: dict[str, Any], load: LoadReference) -> dict[str, Any]:
    """Return the inputs of `evaluate`, with the task's dataset where `data` is missing. UserError if it has none."""
    if "data" in inputs:
        return inputs
    task = load_task(str(getattr(config, "task", "")))
    examples = {"fewshot": load_rows(task, task.examples, load)} if task.examples and "fewshot" not in inputs else {}
    return {**inputs, "data": load_rows(task, get_data_ref(task), load), **examples}


def practice_inputs(config: Config, inputs: dict[str, Any], load: LoadReference) -> dict[str, Any]:
    """Return the inputs of `evaluate.to_training`, with the task's own dataset where `data` is missing."""
    if "data" in inputs or "evaluation" not in inputs:
        return inputs
    evaluation = inputs["evaluation"]
    task = validate_task(evaluation.name, evaluation.read().get("definition"))
    return {**inputs, "data": load_rows(task, get_data_ref(task), load)}


def get_data_ref(task: Task) -> str:
    """Return the reference of a task's dataset. UserError where it has none."""
    if not task.data:
        raise UserError(f"--data is missing, and task {task.name!r} has no dataset of its own")
    return task.data


def load_rows(task: Task, ref: str, load: LoadReference) -> Dataset:
    """Load a reference as the dataset that the task reads. UserError for anything else."""
    dataset = load(ref)
    if not isinstance(dataset, Dataset):
        raise UserError(f"{ref}: is a {dataset.kind}, but task {task.name!r} needs a dataset")
    if task.rows == "chat" and not detect_full_schema(dataset):
        dataset = load(dataset, schema="chat", format=task.format)
    assert isinstance(dataset, Dataset)
    return dataset
