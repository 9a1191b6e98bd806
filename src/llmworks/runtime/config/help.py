"""The fields of a config class for help: name, type, default, description."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # listing stages for help must not import pydantic
    from llmworks.core.artifact import Config


def config_help(
    config: type[Config], prefix: str = "", rates: Mapping[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """Return (field, type and default, description) of every field of a config class.

    Fields of nested configs are written as `optimizer.learning_rate`. `rates`: default learning rates by method, where
    they differ from the field's.
    """
    rates = rates or getattr(config, "default_learning_rates", None)
    rows: list[tuple[str, str, str]] = []
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "fields_of" in extra:  # the config of another stage, documented there
            rows.append((f"{prefix}{name}", f"fields of {extra['fields_of']}", field.description or ""))
            continue
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            rows += config_help(field.annotation, f"{prefix}{name}.", rates)
            continue
        rows.append((f"{prefix}{name}", *field_help(config, name, rates)))
    return rows


def field_help(config: type[Config], name: str, rates: Mapping[str, float] | None = None) -> tuple[str, str]:
    """Return (type and default, description) of one field. rates: as of `config_help`."""
    field = config.model_fields[name]
    hint = format_type(field.annotation)
    default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
    if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
        return "fields", field.description or ""
    if rates and name == "learning_rate":
        own = {**({} if "lora" in rates else {"else": field.default}), **rates}
        default = "default " + ", ".join(
            f"{rate:g} ({method})" if method != "else" else f"{rate:g}" for method, rate in own.items()
        )
    return f"{hint}, {default}", field.description or ""


def format_type(hint: Any) -> str:
    """Return a field's type as a readable string, without annotations."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return format_type(parts[0])
    if origin in (types.UnionType, typing.Union):
        return " | ".join(format_type(part) for part in parts)
    if origin in (list, dict, tuple):
        return f"{origin.__name__}[{', '.join(format_type(part) if part is not ... else '...' for part in parts)}]"
    return (
        "None" if hint is type(None) else hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    )
