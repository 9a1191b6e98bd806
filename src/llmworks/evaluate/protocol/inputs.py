"""Load the dataset that a task names and its few-shot dataset, converted where the task reads conversations."""

from __future__ import annotations

from typing import Any, Protocol

from llmworks.core.artifact import Artifact, Config, Dataset
from llmworks.core.errors import UserError
from llmworks.data.store.rows import converted
from llmworks.evaluate.protocol.load_task import checked, load_task
from llmworks.evaluate.protocol.task import Task


class Load(Protocol):
    """Resolver of references, see `runtime.session.Session.load`."""

    def __call__(self, ref: Artifact | str, *, schema: str = "", format: str = "") -> Artifact:
        """Load the artifact, converted to `schema`."""
        ...


def task_inputs(config: Config, given: dict[str, Any], load: Load) -> dict[str, Any]:
    """Return the inputs of `evaluate`, with the task's dataset where `data` is missing. UserError if it has none."""
    if "data" in given:
        return given
    task = load_task(str(getattr(config, "task", "")))
    examples = {"fewshot": rows_of(task, task.examples, load)} if task.examples and "fewshot" not in given else {}
    return {**given, "data": rows_of(task, named_data(task), load), **examples}


def practice_inputs(config: Config, given: dict[str, Any], load: Load) -> dict[str, Any]:
    """Return the inputs of `evaluate.to_training`, with the task's own dataset where `data` is missing."""
    if "data" in given or "evaluation" not in given:
        return given
    evaluation = given["evaluation"]
    task = checked(evaluation.name, evaluation.read().get("definition"))
    return {**given, "data": rows_of(task, named_data(task), load)}


def named_data(task: Task) -> str:
    """Return the reference of a task's dataset. UserError where it has none."""
    if not task.data:
        raise UserError(f"--data is missing, and task {task.name!r} has no dataset of its own")
    return task.data


def rows_of(task: Task, ref: str, load: Load) -> Dataset:
    """Load a reference as the dataset that the task reads. UserError for anything else."""
    found = load(ref)
    if not isinstance(found, Dataset):
        raise UserError(f"{ref}: is a {found.kind}, but task {task.name!r} needs a dataset")
    if task.rows == "chat" and not converted(found):
        found = load(found, schema="chat", format=task.format)
    assert isinstance(found, Dataset)
    return found
