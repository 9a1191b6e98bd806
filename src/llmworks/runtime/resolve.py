"""Resolve a row of the stage table: its function, config class, inputs and output."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import UserError
from llmworks.runtime.stages import Stage, get_stages

if TYPE_CHECKING:  # listing stages for help must not import pydantic
    from llmworks.core.artifact import Artifact, Config


@dataclass(frozen=True)
class StageInput:
    """One input of a stage: accepted kinds, shape (one, list or mapping), and whether it is required."""

    name: str
    kinds: tuple[type[Artifact], ...]
    shape: str  # "one", "list", "dict"
    required: bool

    def describe(self) -> str:
        """Return the description for help: `model or adapter`, `list of report`."""
        kinds = " or ".join(k.kind for k in self.kinds)
        text = kinds if self.shape == "one" else f"{self.shape} of {kinds}"
        return text if self.required else f"{text}, optional"


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its function imported and its signature read."""

    name: str
    stage: Stage
    function: Callable[..., Artifact]
    config: type[Config]
    inputs: dict[str, StageInput]
    output: type[Artifact]

    def get_output(self, config: Config | None) -> type[Artifact]:
        """Return the output kind for a config, where the config determines it (`artifact_type`)."""
        made: type[Artifact] = getattr(config, "artifact_type", self.output)
        return made

    @staticmethod
    def load_attribute(path: str) -> Any:
        """Return the object named `module:attribute`; None for an empty path."""
        module, _, attribute = path.partition(":")
        return getattr(importlib.import_module(module), attribute) if path else None

    @property
    def help(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""


@functools.cache
def resolve_stage(name: str) -> ResolvedStage:
    """Import a stage and read its signature. UserError for an unknown name, with the nearest one."""
    import difflib

    from llmworks.core.context import Context

    if name not in get_stages():
        near = [one for one in get_stages() if one.partition(".")[2] == name]
        near = near or difflib.get_close_matches(name, get_stages(), n=1)
        raise UserError(
            f"unknown stage {name!r}{f', did you mean {near[0]!r}?' if near else ''}; `llmworks stages` lists them"
        )
    stage = get_stages()[name]
    module, _, attribute = stage.target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    hints = typing.get_type_hints(function)
    inputs: dict[str, StageInput] = {}
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is Context or parameter.name == "config":
            continue
        inputs[parameter.name] = _read_input(
            parameter.name, hints[parameter.name], parameter.default is inspect.Parameter.empty
        )
    made = typing.get_args(hints["return"])  # of several kinds, the first is that of the default config
    return ResolvedStage(name, stage, function, hints["config"], inputs, made[0] if made else hints["return"])


def _read_input(name: str, hint: Any, required: bool) -> StageInput:
    shape = "one"
    some = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(some) == 1:  # optional
        hint = some[0]
    if typing.get_origin(hint) in (list, dict):
        shape = typing.get_origin(hint).__name__
        hint = typing.get_args(hint)[-1]
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = tuple(k for k in typing.get_args(hint) if k is not type(None)) if union else (hint,)
    return StageInput(name, kinds, shape, required)


def find_conversion(to: str) -> ResolvedStage:
    """Return the stage that converts external artifacts to this kind (`converts` in its row)."""
    return resolve_stage(next(name for name, stage in get_stages().items() if stage.converts == to))
