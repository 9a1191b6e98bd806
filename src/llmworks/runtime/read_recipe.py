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
from llmworks.runtime.names import find_input, find_stage
from llmworks.runtime.overrides import assign, config_problem, unknown
from llmworks.runtime.recipe import BOUNDS, Expect, GateStep, Position, Recipe, StageStep, Step, UseStep, referenced
from llmworks.runtime.resolve import resolve
from llmworks.runtime.stages import table

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
    return _Checker(path).check(overrides)


class _Checker:
    """Collects problems with their line numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[Position, int] = {}

    def problem(self, at: Position, text: str) -> None:
        """Record a problem at a position, or at the nearest enclosing position that has a line."""
        while at and at not in self.lines:
            at = at[:-1]
        self.problems.append((self.lines.get(at, 1), text))

    def fail(self) -> RecipeError:
        """Return all problems as one error, in line order."""
        return RecipeError([f"{self.path}:{line}: {text}" for line, text in sorted(self.problems)])

    def check(self, overrides: Sequence[str]) -> Recipe:
        """Run all checks and return the recipe."""
        data = self.read()
        self.unknown_keys((), data, TOP_KEYS)
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
            self.problem(
                ("steps",),
                (
                    f"this is a configuration for {foreign}; convert it with `llmworks import {self.path}`"
                    if foreign
                    else "steps: must be a mapping of step names to steps"
                ),
            )
            raise self.fail()
        self.apply(raw, overrides)
        steps: dict[str, Step] = {}
        for name, body in raw.items():
            step = self.step(str(name), body)
            if step is not None:
                steps[str(name)] = step
        self.check_links(steps, set(map(str, raw)))
        order = self.order(steps)
        seed = data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self.problem(("seed",), f"seed: {seed!r} is not an integer")
        following = data.get("next") or []
        if not isinstance(following, list) or not all(isinstance(line, str) for line in following):
            self.problem(("next",), "next: must be a list of commands")
        name = data.get("name", self.path.stem)
        if not isinstance(name, str) or name in RESERVED or "/" in name or not name or name.startswith("."):
            self.problem(("name",), f"name: {name!r} is not a valid name for a workspace folder")
        if self.problems:
            raise self.fail()
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
            value = self.value(node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError([f"{self.path}:{line}: not YAML: {error.problem}"]) from None
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise RecipeError([f"{self.path}:1: cannot be read as a recipe ({str(error).splitlines()[0]})"]) from None
        if not isinstance(value, dict):
            raise RecipeError([f"{self.path}:1: a recipe must be a mapping with `steps`"])
        return value

    def value(self, node: yaml.Node, at: Position) -> Any:
        """Convert a YAML node to a plain value."""
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self.value(key_node, (*at, "?"))
                if not isinstance(key, str):
                    raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be a string, not {key!r}")
                self.lines[(*at, key)] = key_node.start_mark.line + 1
                if key in out:
                    self.problem((*at, key), f"{key}: duplicate key")
                out[key] = self.value(value_node, (*at, key))
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*at, i)) for i, item in enumerate(node.value)]
        constructor = yaml.SafeLoader("")
        try:
            return constructor.construct_object(node)
        finally:
            constructor.dispose()

    def apply(self, raw: dict[Any, Any], overrides: Sequence[str]) -> None:
        """Apply `step.field=value` or `step.use=REF` to the raw steps."""
        for override in overrides:
            target, equals, text = override.partition("=")
            names = target.split(".")
            if not equals or len(names) < 2:
                self.problem((), f"--set {override}: write it as step.field=value")
                continue
            body = raw.get(names[0])
            if names[0] not in raw:
                self.problem((), f"--set {override}: {unknown('step', names[0], list(map(str, raw)))}")
                continue
            if isinstance(body, dict) and "use" in body and names[1:] == ["use"]:
                body["use"] = text
                continue
            if not isinstance(body, dict) or "stage" not in body:
                self.problem(
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
                self.problem((), f"--set {override}: {error}")

    def unknown_keys(
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
                self.problem((*at, key), f"{'.'.join(map(str, at))}: {problem}" if at else problem)

    def step(self, name: str, body: Any) -> Step | None:
        """Return one step, or None after recording its problems."""
        at: Position = ("steps", name)
        if "/" in name or name.startswith("."):
            self.problem(at, f"{name}: a step's name cannot contain a slash or start with a dot")
        if not isinstance(body, dict):
            self.problem(at, f"{name}: must be a mapping with `use`, `stage` or `gate`")
            return None
        kinds = [kind for kind in STEP_KEYS if kind in body]
        if len(kinds) != 1:
            self.problem(
                at, f"{name}: must have exactly one of `use`, `stage`, `gate`, has {' and '.join(kinds) or 'none'}"
            )
            self.unknown_keys(at, body, [k for keys in STEP_KEYS.values() for k in keys])
            return None
        self.unknown_keys(at, body, STEP_KEYS[kinds[0]])
        return {"use": self.use, "stage": self.stage, "gate": self.gate}[kinds[0]](name, at, body)

    def use(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `use:` step."""
        ref = body["use"]
        if not isinstance(ref, str) or not ref.startswith(SCHEMES):
            self.problem(
                (*at, "use"),
                f"{name}.use: {ref!r} is not a valid reference; write asset:NAME, hf:ORG/NAME, path:DIR,"
                " gguf:FILE, url:URL#sha256=HEX or http://HOST/v1#MODEL",
            )
            return None
        if ref.startswith("asset:"):
            try:
                assets.get(ref.removeprefix("asset:"))
            except AssetError as error:
                self.problem((*at, "use"), f"{name}.use: {error}")
                return None
        if ref.startswith(("path:", "gguf:")) and not Path(ref.partition(":")[2]).expanduser().exists():
            self.problem((*at, "use"), f"{name}.use: {ref.partition(':')[2]}: no such file or directory")
            return None
        return UseStep(name, ref)

    def stage(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `stage:` step: checks that the stage exists, its config is valid and its inputs are known."""
        if not isinstance(body["stage"], str) or body["stage"] not in table():
            known = list(table())
            better = find_stage(str(body["stage"]), known)
            self.problem((*at, "stage"), f"{name}.stage: {unknown('stage', body['stage'], known, better)}")
            return None
        stage = resolve(body["stage"])
        config = self.model(stage.config, body.get("config") or {}, (*at, "config"), f"{name}.config", stage.name)
        expect = self.model(Expect, body.get("expect") or {}, (*at, "expect"), f"{name}.expect")
        inputs = body.get("inputs") or {}
        if not isinstance(inputs, dict):
            self.problem((*at, "inputs"), f"{name}.inputs: must be a mapping of input names to step names")
            return None
        self.unknown_keys((*at, "inputs"), inputs, list(stage.inputs), find_input)
        for wanted in stage.inputs.values():
            if wanted.required and wanted.name not in inputs:
                self.problem((*at, "inputs"), f"{name}.inputs: {wanted.name} ({wanted.describe()}) is missing")
        shapes = {"one": str, "list": list, "dict": dict}
        for key, value in inputs.items():
            if key in stage.inputs and not isinstance(value, shapes[stage.inputs[key].shape]):
                shape = stage.inputs[key].shape
                wanted_value = "a step name" if shape == "one" else f"a {shape} of step names"
                self.problem((*at, "inputs", key), f"{name}.inputs.{key}: must be {wanted_value}")
                return None
        given = {
            k: [v] if isinstance(v, str) else v if isinstance(v, list) else list(v.values()) for k, v in inputs.items()
        }
        wrong = next((k for k, names in given.items() if not all(isinstance(n, str) for n in names)), None)
        if wrong is not None:
            self.problem((*at, "inputs", wrong), f"{name}.inputs.{wrong}: must contain step names only")
            return None
        if config is None or not isinstance(expect, Expect):
            return None
        return StageStep(name, stage, config, {k: v for k, v in inputs.items() if k in stage.inputs}, expect)

    def model(self, model: type[Config], value: Any, at: Position, label: str, stage: str = "") -> Config | None:
        """Validate a mapping against a config class; every error becomes a problem at its own line."""
        if not isinstance(value, dict):
            self.problem(at, f"{label}: must be a mapping")
            return None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for item in error.errors():
                self.problem((*at, *item["loc"]), config_problem(model, item, label, stage))
            return None

    def gate(self, name: str, at: Position, body: Mapping[str, Any]) -> Step | None:
        """Return a `gate:` step."""
        bounds = {key: body[key] for key in BOUNDS if key in body}
        if not isinstance(body.get("metric"), str):
            self.problem((*at, "metric"), f"{name}.metric: must name a metric of the step {body['gate']!r}")
            return None
        if not bounds or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in bounds.values()):
            self.problem(at, f"{name}: needs a number for at least one of {', '.join(BOUNDS)}")
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
            if isinstance(step, GateStep) and step.of not in names:
                self.problem(
                    ("steps", step.name, "gate"), f"{step.name}.gate: {unknown('step', step.of, sorted(names))}"
                )
            if isinstance(step, GateStep) and isinstance(steps.get(step.of), GateStep):
                self.problem(
                    ("steps", step.name, "gate"),
                    f"{step.name}.gate: {step.of!r} is itself a gate; name the step that has the metric",
                )
            if not isinstance(step, StageStep):
                continue
            for role, value in step.inputs.items():
                for given in referenced({role: value}):
                    if given not in names:
                        self.problem(
                            ("steps", step.name, "inputs", role),
                            f"{step.name}.inputs.{role}: {unknown('step', given, sorted(names - {step.name}))}",
                        )
                        continue
                    kind = _kind(steps.get(given))
                    accepted = [k.kind for k in step.stage.inputs[role].kinds]
                    if kind is not None and kind not in accepted:
                        self.problem(
                            ("steps", step.name, "inputs", role),
                            f"{step.name}.inputs.{role}: {given!r} is a {kind}, expected {' or '.join(accepted)}",
                        )

    def order(self, steps: Mapping[str, Step]) -> list[str]:
        """Return step names in topological order, the file's order where possible. Records a cycle."""
        done: list[str] = []
        left = list(steps)
        while left:
            ready = next((n for n in left if all(d in done or d not in steps for d in _needs(steps[n]))), None)
            if ready is None:
                while ends := [n for n in left if not any(n in _needs(steps[other]) for other in left)]:
                    left = [n for n in left if n not in ends]  # depends on the cycle, is not part of it
                self.problem(("steps", left[0]), f"{left[0]}: circular dependency between steps: {', '.join(left)}")
                break
            left.remove(ready)
            done.append(ready)
        return done


def _needs(step: Step) -> list[str]:
    if isinstance(step, GateStep):
        return [step.of]
    return referenced(step.inputs) if isinstance(step, StageStep) else []


def _kind(step: Step | None) -> str | None:
    """Return the kind a step makes, where it is known before running."""
    if isinstance(step, StageStep):
        return step.stage.output_of(step.config).kind
    if isinstance(step, UseStep):
        if step.ref.startswith("asset:"):
            return assets.get(step.ref.removeprefix("asset:")).kind
        if step.ref.startswith(("gguf:", "http")):
            return "model"
    return "gate" if isinstance(step, GateStep) else None
