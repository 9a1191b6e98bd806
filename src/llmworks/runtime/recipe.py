"""Recipes: typed steps read from YAML.

A step is `use:` (an external artifact), `stage:` (a function of the stage table) or `gate:` (a check that stops the
run). Runs nothing and resolves no references.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from llmworks.core.artifact import Artifact, Config
from llmworks.core.errors import UserError
from llmworks.runtime.resolve import ResolvedStage

Position = tuple[str | int, ...]
InputNames = str | list[str] | dict[str, str]


class Expect(Config):
    """Expected cost of a step, measured by the recipe's author; shown by `plan` until measured in this workspace."""

    seconds: float = Field(0, ge=0, description="wall time on the author's machine")
    memory_mb: float = Field(0, ge=0, description="peak memory")
    disk_mb: float = Field(0, ge=0, description="size of the result")


@dataclass(frozen=True)
class UseStep:
    """A step that uses an external artifact."""

    name: str
    ref: str


@dataclass(frozen=True)
class StageStep:
    """A stage with its config and the names of the steps that are its inputs."""

    name: str
    stage: ResolvedStage
    config: Config
    inputs: dict[str, InputNames]
    expect: Expect


@dataclass(frozen=True)
class GateStep:
    """A check on a metric of a step. `bounds` maps above, below, at_least, at_most to a number."""

    name: str
    step: str
    metric: str
    bounds: dict[str, float]
    because: str


Step = UseStep | StageStep | GateStep


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; steps in an executable order, the file's order where possible."""

    name: str
    path: Path
    seed: int
    about: str
    steps: dict[str, Step]
    next: tuple[str, ...]


BOUNDS = ("above", "below", "at_least", "at_most")


def find_referenced_steps(inputs: Mapping[str, InputNames]) -> list[str]:
    """Return all step names in a mapping of inputs."""
    return [
        name
        for value in inputs.values()
        for name in ([value] if isinstance(value, str) else value if isinstance(value, list) else value.values())
    ]


def check_gate(gate: GateStep, artifact: Artifact) -> tuple[bool, str]:
    """Return (whether the gate passes, one line with the values). UserError when there is no such metric."""
    value = artifact.metrics.get(gate.metric)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        numbers = [k for k, v in artifact.metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        raise UserError(f"gate {gate.name}: {gate.step} has no metric {gate.metric!r}; it has {', '.join(numbers)}")
    tests = {
        "above": lambda b: value > b,
        "below": lambda b: value < b,
        "at_least": lambda b: value >= b,
        "at_most": lambda b: value <= b,
    }
    words = " and ".join(f"{key.replace('_', ' ')} {bound:g}" for key, bound in gate.bounds.items())
    holds = all(tests[key](bound) for key, bound in gate.bounds.items())
    return holds, f"{gate.step}.{gate.metric} is {value:.4g}, required {words}"
