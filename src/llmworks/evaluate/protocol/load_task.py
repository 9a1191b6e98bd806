"""Load a task: built-in by name, from one of our YAML files, or from an lm-evaluation-harness file."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmworks.core.errors import UserError
from llmworks.evaluate.protocol.task import Task


def task_names() -> list[str]:
    """List the built-in tasks."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("llmworks.evaluate").joinpath("tasks").iterdir()
        if p.name.endswith(".yaml")
    )


def load_task(name: str) -> Task:
    """Load a built-in task by name, or a YAML file of ours or of the lm-evaluation-harness.

    UserError for one that is neither, or invalid.
    """
    import yaml

    if not name.endswith((".yaml", ".yml")):
        if name not in task_names():
            near = difflib.get_close_matches(name, task_names(), n=1)
            raise UserError(
                f"unknown task {name!r}"
                + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(task_names())}, or a YAML file")
            )
        text = resources.files("llmworks.evaluate").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
        return validate_task(name, yaml.safe_load(text))
    from llmworks.evaluate.protocol.harness import from_harness, load_yaml

    path = Path(name)
    values = load_yaml(path)
    if "task" not in values and "output_type" not in values:
        return resolve_data_paths(validate_task(name, values), path)
    try:
        return resolve_data_paths(validate_task(name, from_harness(values, path)), path)
    except (
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        RecursionError,
    ) as error:  # external files may contain anything
        raise UserError(
            f"{name}: is not a readable lm-evaluation-harness task ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:120]})"
        ) from None


def resolve_data_paths(task: Task, path: Path) -> Task:
    """Resolve the task's data files relative to its own file, independent of the current directory."""
    found = {
        field: str(path.parent / ref)
        for field in ("data", "examples")
        if (ref := getattr(task, field)) and ":" not in ref and (path.parent / ref).exists()
    }
    return task.model_copy(update=found) if found else task


def validate_task(name: str, values: Any) -> Task:
    """Validate a task from parsed YAML. UserError naming the first invalid field."""
    from llmworks.evaluate.statistics.metrics import check_metric

    if not isinstance(values, dict):
        raise UserError(f"{name}: must be a mapping of a task's fields")
    try:
        task = Task.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            close_matches = difflib.get_close_matches(where, Task.model_fields, n=1)
            message = f"unknown field {where!r}" + (
                f", did you mean {close_matches[0]!r}?" if close_matches else f"; known: {', '.join(Task.model_fields)}"
            )
            where = ""
        raise UserError(f"{name}: {f'{where}: ' if where else ''}{message}") from None
    for measure in task.metrics:
        check_metric(task.kind, measure, name)
    return task
