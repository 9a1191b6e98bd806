"""Suites: named groups of tasks that are run together, defined in suites.yaml."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError


class SuiteTask(Config):
    """One task of a suite."""

    task: str = Field(description="name of a task")
    limit: int | None = Field(None, gt=0, description="evaluate only the first rows")


class Suite(Config):
    """A group of tasks."""

    what: str = Field(description="one line: what the tasks are, and their cost")
    tasks: list[SuiteTask] = Field(description="the tasks, in running order")


@cache
def load_suites() -> dict[str, Suite]:
    """Load all suites by name."""
    import yaml

    text = resources.files("llmworks.evaluate").joinpath("suites.yaml").read_text(encoding="utf-8")
    return {name: Suite.model_validate(values) for name, values in yaml.safe_load(text).items()}


def resolve_items(names: str, limit: int | None = None) -> list[SuiteTask]:
    """Resolve comma-separated names of suites and tasks; `limit` overrides theirs.

    UserError for an unknown name.
    """
    from llmworks.evaluate.protocol.load_task import task_names

    out: list[SuiteTask] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        known = load_suites()
        if name in known:
            out += known[name].tasks
        elif name in task_names() or name.endswith((".yaml", ".yml")):
            out.append(SuiteTask(task=name))
        else:
            near = difflib.get_close_matches(name, [*known, *task_names()], n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"suites: {', '.join(known)}; tasks: {', '.join(task_names())}"
            )
            raise UserError(f"no suite or task is named {name!r}; {hint}")
    if not out:
        raise UserError("no task given; name suites or tasks separated by commas, as in quick,code")
    return [item if limit is None else SuiteTask(task=item.task, limit=limit) for item in dict.fromkeys(out)]
