"""A JSON schema of recipes, built from the stage table and the configs, for completion and validation in editors."""

from __future__ import annotations

from typing import Any

from llmworks.runtime.recipe import BOUNDS, Expect
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.stages import get_stages


def build_recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    names = {"type": "string", "description": "name of another step"}
    variants = _build_other_steps(names)
    definitions: dict[str, Any] = {}
    for name in (name for name, stage in get_stages().items() if not stage.internal):
        stage = resolve_stage(name)
        shapes: dict[str, dict[str, Any]] = {
            "one": names,
            "list": {"type": "array", "items": names},
            "dict": {"type": "object", "additionalProperties": names},
        }
        inputs = {i.name: {**shapes[i.shape], "description": i.describe()} for i in stage.inputs.values()}
        schema = stage.config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        definitions |= {f"{name}.{key}": value for key, value in schema.pop("$defs", {}).items()}
        variants.append(
            {
                "type": "object",
                "required": ["stage"],
                "additionalProperties": False,
                "description": stage.stage.summary,
                "properties": {
                    "stage": {"const": name},
                    "config": schema,
                    "expect": Expect.model_json_schema(),
                    "inputs": {
                        "type": "object",
                        "properties": inputs,
                        "additionalProperties": False,
                        "required": [i.name for i in stage.inputs.values() if i.required],
                    },
                },
            }
        )
    top = {
        "name": {"type": "string"},
        "about": {"type": "string"},
        "seed": {"type": "integer"},
        "next": {"type": "array", "items": {"type": "string"}},
        "steps": {"type": "object", "additionalProperties": {"oneOf": variants}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmworks recipe",
        "type": "object",
        "required": ["steps"],
        "additionalProperties": False,
        "properties": top,
        "$defs": definitions,
    }


def _build_other_steps(names: dict[str, str]) -> list[dict[str, Any]]:
    """Return the schemas of steps that are not stages: `use` steps and gates."""
    variants: list[dict[str, Any]] = [
        {
            "type": "object",
            "required": ["use"],
            "additionalProperties": False,
            "properties": {
                "use": {
                    "type": "string",
                    "description": (
                        "asset:NAME, hf:ORG/NAME, path:DIR, gguf:FILE, url:URL#sha256=HEX or http://HOST/v1#MODEL"
                    ),
                }
            },
        },
        {
            "type": "object",
            "required": ["gate", "metric"],
            "additionalProperties": False,
            "properties": {
                "gate": names,
                "metric": {"type": "string"},
                "because": {"type": "string"},
                **{b: {"type": "number"} for b in BOUNDS},
            },
        },
    ]
    return variants
