"""Read a recipe and validate it completely before anything runs: one line per error, with file and line number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmworks import assets
from llmworks.core.artifact import Config
from llmworks.core.errors import AssetError, RecipeError, UserError
from llmworks.core.workspace import RESERVED
from llmworks.runtime.config.errors import describe_errors, unknown
from llmworks.runtime.config.overrides import assign
from llmworks.runtime.names import find_input, find_stage
from llmworks.runtime.recipe import (
    BOUNDS,
    Expect,
    GateStep,
    Position,
    Recipe,
    StageStep,
    Step,
    UseStep,
    find_referenced_steps,
)
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.stages import get_stages

SCHEMES = ("asset:", "hf:", "path:", "gguf:", "url:", "http://", "https://")


STEP_KEYS = {
    "use": ("use",),
    "stage": ("stage", "inputs", "config", "expect"),
    "gate": ("gate", "metric", "above", "below", "at_least", "at_most", "because"),
}


TOP_KEYS = ("name", "about", "seed", "steps", "next")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are `step.field=value`, or `step.use=REF`.

    RecipeError with every problem found.
    """
    return _RecipeReader(path).check(overrides)


class _RecipeReader:
    """Collects problems with their line numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[Position, int] = {}

    def add_problem(self, at: Position, text: str) -> None:
        """Record a problem at a position, or at the nearest enclosing position that has a line."""
        while at and at not in self.lines:
            at = at[:-1]
        self.problems.append((self.lines.get(at, 1), text))

    def build_error(self) -> RecipeError:
        """Return all problems as one error, in line order."""
        return RecipeError([f"{self.path}:{line}: {text}" for line, text in sorted(self.problems)])

    def check(self, overrides: Sequence[str]) -> Recipe:
        """Run all checks and return the recipe."""
        data = self.read()
        self.check_keys((), data, TOP_KEYS)
        raw = data.get("steps")
        if not isinstance(raw, dict) or not raw:
            foreign = next(
                (
                    tool
                    for key, tool in (("base_model", "Axolotl"), ("model_name_or_path", "LLaMA-Factory"))
                    if key in data
                ),
                "",
            )
            self.add_problem(
                ("steps",),
                (
                    f"this is a configuration for {foreign}; convert it with `llmworks import {self.path}`"
                    if foreign
                    else "steps: must be a mapping of step names to steps"
                ),
            )
            raise self.build_error()
        self.apply_overrides(raw, overrides)
        steps: dict[str, Step] = {}
        for name, body in raw.items():
            step = self.parse_step(str(name), body)
            if step is not None:
                steps[str(name)] = step
        self.check_links(steps, set(map(str, raw)))
        order = self.sort_steps(steps)
        seed = data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self.add_problem(("seed",), f"seed: {seed!r} is not an integer")
        following = data.get("next") or []
        if not isinstance(following, list) or not all(isinstance(line, str) for line in following):
            self.add_problem(("next",), "next: must be a list of commands")
        name = data.get("name", self.path.stem)
        if not isinstance(name, str) or name in RESERVED or "/" in name or not name or name.startswith("."):
            self.add_problem(("name",), f"name: {name!r} is not a valid name for a workspace folder")
        if self.problems:
            raise self.build_error()
        return Recipe(
            name, self.path, seed, str(data.get("about", "")).strip(), {n: steps[n] for n in order}, tuple(following)
        )

    def read(self) -> dict[str, Any]:
        """Read the YAML file as plain values, recording the line of every key and item."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError([f"{self.path}: no such recipe file"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError([f"{self.path}: cannot be read ({error})"]) from None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if node is None:
                raise RecipeError([f"{self.path}:1: the file is empty"])
            value = self.convert_node(node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError([f"{self.path}:{line}: not YAML: {error.problem}"]) from None
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise RecipeError([f"{self.path}:1: cannot be read as a recipe ({str(error).splitlines()[0]})"]) from None
        if not isinstance(value, dict):
            raise RecipeError([f"{self.path}:1: a recipe must be a mapping with `steps`"])
        return value

    def convert_node(self, node: yaml.Node, at: Position) -> Any:
        """Convert a YAML node to a plain value."""
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self.convert_node(key_node, (*at, "?"))
                if not isinstance(key, str):
                    raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be a string, not {key!r}")
                self.lines[(*at, key)] = key_node.start_mark.line + 1
                if key in out:
                    self.add_problem((*at, key), f"{key}: duplicate key")
                out[key] = self.convert_node(value_node, (*at, key))
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self.convert_node(item, (*at, i)) for i, item in enumerate(node.value)]
        constructor = yaml.SafeLoader("")
        try:
            return constructor.construct_object(node)
        finally:
            constructor.dispose()

    def apply_overrides(self, raw: dict[Any, Any], overrides: Sequence[str]) -> None:
        """Apply `step.field=value` or `step.use=REF` to the raw steps."""
        for override in overrides:
            target, equals, text = override.partition("=")
            names = target.split(".")
            if not equals or len(names) < 2:
                self.add_problem((), f"--set {override}: write it as step.field=value")
                continue
            body = raw.get(names[0])
            if names[0] not in raw:
                self.add_problem((), f"--set {override}: {unknown('step', names[0], list(map(str, raw)))}")
                continue
            if isinstance(body, dict) and "use" in body and names[1:] == ["use"]:
                body["use"] = text
                continue
            if not isinstance(body, dict) or "stage" not in body:
                self.add_problem(
                    (),
                    f"--set {override}: {names[0]} is not a stage step and has no config"
                    + (
                        "; set its reference with " + names[0] + ".use"
                        if isinstance(body, dict) and "use" in body
                        else ""
                    ),
                )
                continue
            body["config"] = body.get("config") or {}
            try:
                assign(body["config"], names[1:], text)
            except UserError as error:
                self.add_problem((), f"--set {override}: {error}")

    def check_keys(
        self,
        at: Position,
        value: Mapping[Any, Any],
        known: Sequence[str],
        better: Callable[[str, Sequence[str]], str] | None = None,
    ) -> None:
        """Record a problem for every unknown key."""
        for key in value:
            if key not in known:
                problem = unknown("key", key, known, better(str(key), known) if better else "")
                self.add_problem((*at, key), f"{'.'.join(map(str, at))}: {problem}" if at else problem)

    def parse_step(self, name: str, body: Any) -> Step | None:
        """Return one step, or None after recording its problems."""
        at: Position = ("steps", name)
        if "/" in name or name.startswith("."):
            self.add_problem(at, f"{name}: a step's name cannot contain a slash or start with a dot")
        if not isinstance(body, dict):
            self.add_problem(at, f"{name}: must be a mapping with `use`, `stage` or `gate`")
            return None
        kinds = [kind for kind in STEP_KEYS if kind in body]
        if len(kinds) != 1:
            self.add_problem(
                at, f"{name}: must have exactly one of `use`, `stage`, `gate`, has {' and '.join(kinds) or 'none'}"
            )
            self.check_keys(at, body, [k for keys in STEP_KEYS.values() for k in keys])
            return None
        self.check_keys(at, body, STEP_KEYS[kinds[0]])
        return {"use": self.parse_use, "stage": self.parse_stage, "gate": self.parse_gate}[kinds[0]](name, at, body)

    def parse_use(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `use:` step."""
        ref = body["use"]
        if not isinstance(ref, str) or not ref.startswith(SCHEMES):
            self.add_problem(
                (*at, "use"),
                f"{name}.use: {ref!r} is not a valid reference; write asset:NAME, hf:ORG/NAME, path:DIR,"
                " gguf:FILE, url:URL#sha256=HEX or http://HOST/v1#MODEL",
            )
            return None
        if ref.startswith("asset:"):
            try:
                assets.get_asset(ref.removeprefix("asset:"))
            except AssetError as error:
                self.add_problem((*at, "use"), f"{name}.use: {error}")
                return None
        if ref.startswith(("path:", "gguf:")) and not Path(ref.partition(":")[2]).expanduser().exists():
            self.add_problem((*at, "use"), f"{name}.use: {ref.partition(':')[2]}: no such file or directory")
            return None
        return UseStep(name, ref)

    def parse_stage(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `stage:` step: checks that the stage exists, its config is valid and its inputs are known."""
        if not isinstance(body["stage"], str) or body["stage"] not in get_stages():
            known = list(get_stages())
            better = find_stage(str(body["stage"]), known)
            self.add_problem((*at, "stage"), f"{name}.stage: {unknown('stage', body['stage'], known, better)}")
            return None
        stage = resolve_stage(body["stage"])
        config = self.validate_model(
            stage.config, body.get("config") or {}, (*at, "config"), f"{name}.config", stage.name
        )
        expect = self.validate_model(Expect, body.get("expect") or {}, (*at, "expect"), f"{name}.expect")
        inputs = body.get("inputs") or {}
        if not isinstance(inputs, dict):
            self.add_problem((*at, "inputs"), f"{name}.inputs: must be a mapping of input names to step names")
            return None
        self.check_keys((*at, "inputs"), inputs, list(stage.inputs), find_input)
        for wanted in stage.inputs.values():
            if wanted.required and wanted.name not in inputs:
                self.add_problem((*at, "inputs"), f"{name}.inputs: {wanted.name} ({wanted.describe()}) is missing")
        shapes = {"one": str, "list": list, "dict": dict}
        for key, value in inputs.items():
            if key in stage.inputs and not isinstance(value, shapes[stage.inputs[key].shape]):
                shape = stage.inputs[key].shape
                wanted_value = "a step name" if shape == "one" else f"a {shape} of step names"
                self.add_problem((*at, "inputs", key), f"{name}.inputs.{key}: must be {wanted_value}")
                return None
        given = {
            k: [v] if isinstance(v, str) else v if isinstance(v, list) else list(v.values()) for k, v in inputs.items()
        }
        wrong = next((k for k, names in given.items() if not all(isinstance(n, str) for n in names)), None)
        if wrong is not None:
            self.add_problem((*at, "inputs", wrong), f"{name}.inputs.{wrong}: must contain step names only")
            return None
        if config is None or not isinstance(expect, Expect):
            return None
        return StageStep(name, stage, config, {k: v for k, v in inputs.items() if k in stage.inputs}, expect)

    def validate_model(
        self, model: type[Config], value: Any, at: Position, label: str, stage: str = ""
    ) -> Config | None:
        """Validate a mapping against a config class; every error becomes a problem at its own line."""
        if not isinstance(value, dict):
            self.add_problem(at, f"{label}: must be a mapping")
            return None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for place, text in describe_errors(model, [*error.errors()], label, stage):
                self.add_problem((*at, *place), text)
            return None

    def parse_gate(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `gate:` step."""
        bounds = {key: body[key] for key in BOUNDS if key in body}
        if not isinstance(body.get("metric"), str):
            self.add_problem((*at, "metric"), f"{name}.metric: must name a metric of the step {body['gate']!r}")
            return None
        if not bounds or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in bounds.values()):
            self.add_problem(at, f"{name}: needs a number for at least one of {', '.join(BOUNDS)}")
            return None
        return GateStep(
            name,
            str(body["gate"]),
            body["metric"],
            {k: float(v) for k, v in bounds.items()},
            str(body.get("because", "")),
        )

    def check_links(self, steps: Mapping[str, Step], names: set[str]) -> None:
        """Check that every referenced step exists and has a kind that the input accepts."""
        for step in steps.values():
            if isinstance(step, GateStep) and step.step not in names:
                self.add_problem(
                    ("steps", step.name, "gate"), f"{step.name}.gate: {unknown('step', step.step, sorted(names))}"
                )
            if isinstance(step, GateStep) and isinstance(steps.get(step.step), GateStep):
                self.add_problem(
                    ("steps", step.name, "gate"),
                    f"{step.name}.gate: {step.step!r} is itself a gate; name the step that has the metric",
                )
            if not isinstance(step, StageStep):
                continue
            for role, value in step.inputs.items():
                for given in find_referenced_steps({role: value}):
                    if given not in names:
                        self.add_problem(
                            ("steps", step.name, "inputs", role),
                            f"{step.name}.inputs.{role}: {unknown('step', given, sorted(names - {step.name}))}",
                        )
                        continue
                    kind = _get_kind(steps.get(given))
                    accepted = [k.kind for k in step.stage.inputs[role].kinds]
                    if kind is not None and kind not in accepted:
                        self.add_problem(
                            ("steps", step.name, "inputs", role),
                            f"{step.name}.inputs.{role}: {given!r} is a {kind}, expected {' or '.join(accepted)}",
                        )

    def sort_steps(self, steps: Mapping[str, Step]) -> list[str]:
        """Return step names in topological order, the file's order where possible. Records a cycle."""
        done: list[str] = []
        left = list(steps)
        while left:
            ready = next(
                (n for n in left if all(d in done or d not in steps for d in _get_dependencies(steps[n]))), None
            )
            if ready is None:
                while ends := [n for n in left if not any(n in _get_dependencies(steps[other]) for other in left)]:
                    left = [n for n in left if n not in ends]  # depends on the cycle, is not part of it
                self.add_problem(("steps", left[0]), f"{left[0]}: circular dependency between steps: {', '.join(left)}")
                break
            left.remove(ready)
            done.append(ready)
        return done


def _get_dependencies(step: Step) -> list[str]:
    if isinstance(step, GateStep):
        return [step.step]
    return find_referenced_steps(step.inputs) if isinstance(step, StageStep) else []


def _get_kind(step: Step | None) -> str | None:
    """Return the kind a step makes, where it is known before running."""
    if isinstance(step, StageStep):
        return step.stage.get_output(step.config).kind
    if isinstance(step, UseStep):
        if step.ref.startswith("asset:"):
            return assets.get_asset(step.ref.removeprefix("asset:")).kind
        if step.ref.startswith(("gguf:", "http")):
            return "model"
    return "gate" if isinstance(step, GateStep) else None
