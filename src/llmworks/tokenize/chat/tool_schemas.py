"""Tool schemas in the shapes that are in use: OpenAI's, Anthropic's, with nulls that table formats add."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmworks.core.types import Json


def normalize_tool(tool: Any) -> Json:
    """Return a function {name, description, parameters} of a tool; a plain function is returned as it is.

    A property that is null is none: tables fill fields that a row does not have with null. `true` is a property of any
    type. `required: true` in a property is the older form of the list. Errors: ValueError, which names the tool.
    """
    function = tool
    while isinstance(function, Mapping) and "function" in function:
        function = function["function"]
    if not isinstance(function, Mapping):
        raise ValueError(f"a tool must be a function with a name, not {_describe(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a tool has no name ({', '.join(map(str, function)) or 'it is empty'})")
    made = {key: value for key, value in function.items() if value is not None}
    if "input_schema" in made and "parameters" not in made:
        made["parameters"] = made.pop("input_schema")
    if not isinstance(made.get("description", ""), str):
        raise ValueError(f"the description of tool {name!r} must be text, not {_describe(made['description'])}")
    if "parameters" in made:
        made["parameters"] = _normalize_parameters(name, made["parameters"])
    return made


def _normalize_parameters(name: str, given: Any) -> Json:
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except ValueError:
            raise ValueError(f"the parameters of tool {name!r} are text that is not JSON") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"the parameters of tool {name!r} must be a JSON schema, not {_describe(given)}")
    made = {key: value for key, value in given.items() if value is not None}
    properties = made.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"the properties of tool {name!r} must be an object, not {_describe(properties)}")
    required = made.get("required", [])
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise ValueError(f"`required` of tool {name!r} must be a list of names, not {_describe(required)}")
    if "properties" in made:
        made["properties"] = {
            one: _normalize_property(name, one, spec) for one, spec in properties.items() if spec is not None
        }
        marked = [one for one, spec in properties.items() if isinstance(spec, Mapping) and spec.get("required") is True]
        if marked:
            made["required"] = list(dict.fromkeys([*required, *marked]))
    return made


def _normalize_property(tool: str, name: str, spec: Any) -> Json:
    if spec is True:
        return {}
    if not isinstance(spec, Mapping):
        raise ValueError(f"the property {name!r} of tool {tool!r} must be a JSON schema, not {_describe(spec)}")
    nullable = "null" in spec["type"] if isinstance(spec.get("type"), list) else bool(spec.get("nullable"))
    made = {
        key: value
        for key, value in spec.items()
        if (value is not None or (key == "default" and nullable)) and (key != "required" or isinstance(value, list))
    }
    if not isinstance(made.get("description", ""), str):
        raise ValueError(f"the description of {name!r} of tool {tool!r} must be text")
    return made


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def drop_padding(arguments: Json, function: Json | None) -> Json:
    """Return a call's arguments without nulls of parameters that the function does not have.

    They come from a table whose rows share the fields of all functions.
    """
    if function is None or None not in arguments.values():
        return arguments
    names = (function.get("parameters") or {}).get("properties") or {}
    return {name: value for name, value in arguments.items() if value is not None or name in names}
