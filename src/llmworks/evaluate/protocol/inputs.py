"""The rows that a task names: its data set, and that of its examples, converted where it reads conversations."""

from __future__ import annotations

from typing import Any, Protocol

from llmworks.core.artifact import Artifact, Config, Dataset
from llmworks.core.errors import UserError
from llmworks.data.store.rows import converted
from llmworks.evaluate.protocol.load_task import checked, load_task
from llmworks.evaluate.protocol.task import Task


class Load(Protocol):
    """Resolves a reference, see `runtime.session.Session.load`."""

    def __call__(self, ref: Artifact | str, *, schema: str = "", format: str = "") -> Artifact:
        """The artifact, converted to `schema`."""
        ...


def task_inputs(config: Config, given: dict[str, Any], load: Load) -> dict[str, Any]:
    """Inputs of an evaluation, with the rows that its task names where none are given. UserError if it names none."""
    if "data" in given:
        return given
    task = load_task(str(getattr(config, "task", "")))
    examples = {"fewshot": rows_of(task, task.examples, load)} if task.examples and "fewshot" not in given else {}
    return {**given, "data": rows_of(task, named_data(task), load), **examples}


def practice_inputs(config: Config, given: dict[str, Any], load: Load) -> dict[str, Any]:
    """Inputs of what is made of an evaluation, with the rows that its task asked. UserError where it names none."""
    if "data" in given or "evaluation" not in given:
        return given
    evaluation = given["evaluation"]
    task = checked(evaluation.name, evaluation.read().get("definition"))
    return {**given, "data": rows_of(task, named_data(task), load)}


def named_data(task: Task) -> str:
    """The data set that a task names. UserError where it names none."""
    if not task.data:
        raise UserError(f"--data is missing, and the task {task.name!r} names no data set of its own")
    return task.data


def rows_of(task: Task, ref: str, load: Load) -> Dataset:
    """The data set behind a reference as the task reads it. UserError for anything else."""
    found = load(ref)
    if not isinstance(found, Dataset):
        raise UserError(f"{ref}: is a {found.kind}, and the task {task.name!r} wants rows")
    if task.rows == "chat" and not converted(found):
        found = load(found, schema="chat", format=task.format)
    assert isinstance(found, Dataset)
    return found
