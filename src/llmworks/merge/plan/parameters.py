"""Evaluate a merge parameter for one tensor: first its filters, then its position in a gradient. Does not know methods.

As mergekit's `evaluate_setting`: the first condition whose filter is in the tensor's name applies; a gradient of n
values is interpolated linearly over the layers, t from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import UserError
from llmworks.merge.plan.config import Condition, Setting

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method. `of`: the whole tensor, each input, or each input but the base."""

    name: str
    kind: type
    of: str = "tensor"  # tensor, input, other
    default: Any = REQUIRED
    low: float = float("-inf")
    high: float = float("inf")


def evaluate_parameter(
    parameter: Parameter, sources: Iterable[Mapping[str, Setting]], tensor: str, t: float, where: str
) -> Any:
    """Return a parameter's value, from settings ordered from the most specific to the most general.

    UserError for a value of the wrong type, or if none is given and there is no default.
    """
    for settings in sources:
        if parameter.name in settings:
            found = _evaluate(settings[parameter.name], tensor, t, parameter, where)
            if found is not None:
                return found
    if parameter.default is REQUIRED:
        raise UserError(f"{where}: the parameter {parameter.name} is missing for {tensor}")
    return parameter.default


def iter_filters(settings: Mapping[str, Setting]) -> Iterable[str]:
    """Yield the name filters of settings."""
    for setting in settings.values():
        for one in setting if isinstance(setting, list) else [setting]:
            if isinstance(one, Condition) and one.filter not in (None, "*"):
                yield str(one.filter)


def _evaluate(setting: Setting, tensor: str, t: float, parameter: Parameter, where: str) -> Any:
    conditions = [setting] if isinstance(setting, Condition) else setting
    if not isinstance(conditions, list):
        return _convert(conditions, parameter, where)
    if conditions and all(isinstance(one, Condition) for one in conditions):
        for one in conditions:
            if isinstance(one, Condition) and (one.filter in (None, "*") or str(one.filter) in tensor):
                return _evaluate(one.value, tensor, t, parameter, where)
        return None
    values = [_convert(one, parameter, where) for one in conditions]
    if not values:
        return None
    at = t * (len(values) - 1)
    if parameter.kind is not float:
        return values[int(at)]
    low = int(at)
    high, share = min(len(values) - 1, low + 1), at - low
    return (1 - share) * values[low] + share * values[high]


def _convert(value: Any, parameter: Parameter, where: str) -> Any:
    try:
        if parameter.kind is bool:
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
        elif not isinstance(value, bool):
            found = parameter.kind(value)
            if not parameter.low <= found <= parameter.high and abs(found) != float("inf"):
                bounded = parameter.high != float("inf")
                wanted = f"from {parameter.low:g} to {parameter.high:g}" if bounded else f"{parameter.low:g} or more"
                raise UserError(f"{where}: {parameter.name} is {value!r}, it must be {wanted}")
            if found == found and abs(found) != float("inf"):
                return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(
        f"{where}: {parameter.name} is {value!r}, it must be"
        f" {'true or false' if parameter.kind is bool else 'a number' if parameter.kind is float else 'an integer'}"
    )
