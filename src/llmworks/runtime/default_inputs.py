"""The rows that a task names: its data set, and that of its examples, converted where it reads conversations.

Knows no model.
"""

from __future__ import annotations

from typing import Any

from llmworks.core.artifact import Config, Dataset, load
from llmworks.core.errors import UserError
from llmworks.core.workspace import Workspace, cache_directory
from llmworks.data.store.rows import converted
from llmworks.evaluate.protocol.load_task import checked, load_task
from llmworks.evaluate.protocol.task import Task
from llmworks.runtime.execute import execute
from llmworks.runtime.references import open_engine, resolve
from llmworks.runtime.resolve import ResolvedStage
from llmworks.runtime.resolve import resolve as resolve_stage


def default_inputs(stage: ResolvedStage, config: Config, given: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """The inputs of a stage, with those that its task names where none were given."""
    if (
        "data" in given
        or stage.name not in ("evaluate", "evaluate.practice")
        or (stage.name == "evaluate.practice" and "evaluation" not in given)
    ):
        return given
    task = (
        load_task(str(getattr(config, "task", "")))
        if stage.name == "evaluate"
        else checked(given["evaluation"].name, given["evaluation"].read().get("definition"))
    )
    if not task.data:
        raise UserError(f"--data is missing, and the task {task.name!r} names no data set of its own")
    if stage.name == "evaluate.practice":
        return {**given, "data": rows_of(task, task.data, workspace)}
    examples = (
        {"examples": rows_of(task, task.examples, workspace)} if task.examples and "examples" not in given else {}
    )
    return {**given, "data": rows_of(task, task.data, workspace), **examples}


def rows_of(task: Task, ref: str, workspace: Workspace | None = None) -> Dataset:
    """The data set behind a reference as the task reads it. UserError for anything else."""
    found = resolve(ref, workspace=workspace)
    if not isinstance(found, Dataset):
        raise UserError(f"{ref}: is a {found.kind}, and the task {task.name!r} wants rows")
    if task.rows != "chat" or converted(found):
        return found
    stage = resolve_stage("data.chat")
    config = stage.config.model_validate({"format": task.format} if task.format else {})
    done = execute(
        stage,
        config,
        {"data": found},
        Workspace(cache_directory() / "converted"),
        seed=0,
        open_engine=open_engine,
        quiet=True,
    )
    made = load(done.artifact.path, name=found.name, ref=ref)
    assert isinstance(made, Dataset)
    return made
