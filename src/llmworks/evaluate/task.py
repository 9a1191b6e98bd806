"""Tasks are data: a YAML file says what is asked, how long an answer may be, and how it is scored."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

from pydantic import Field

from llmworks.artifact import Config
from llmworks.errors import UserError


class Task(Config):
    """One task, as its YAML file has it."""

    name: str = Field(description="the task's name, equal to its file's")
    what: str = Field(description="one line: what is measured")
    data: Literal["chat"] = Field(description="schema of the rows it reads")
    max_tokens: int = Field(gt=0, description="longest answer, in tokens")
    score: str = Field(description="name of a score function")


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("llmworks.evaluate").joinpath("tasks").iterdir() if p.name.endswith(".yaml")
    )


@cache
def load_task(name: str) -> Task:
    """A built-in task. UserError for an unknown one."""
    import yaml

    if name not in task_names():
        raise UserError(f"unknown task {name!r}; known: {', '.join(task_names())}")
    text = resources.files("llmworks.evaluate").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    return Task.model_validate(yaml.safe_load(text))
