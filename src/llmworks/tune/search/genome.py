"""Searchable parameters of a merge: method parameters with bounds, each a single value or one per group of layers.

Does not know optimizers or models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import UserError

BOUNDS = {
    "weight": (0.0, 1.0),
    "t": (0.0, 1.0),
    "density": (0.05, 1.0),
    "lambda": (0.0, 2.0),
    "gamma": (0.0, 0.2),
    "epsilon": (0.01, 0.3),
    "select_topk": (0.05, 1.0),
    "scale": (0.0, 2.0),
}
ParameterPath = tuple[str | int, ...]


@dataclass(frozen=True)
class MergeParameter:
    """One parameter: its path in the configuration, bounds and initial value."""

    path: ParameterPath
    low: float
    high: float
    start: float

    @property
    def name(self) -> str:
        """Dotted name, as in --set."""
        return ".".join(map(str, self.path))


def list_parameters(config: Mapping[str, Any], *, gradient: int = 1, negative: bool = False) -> list[MergeParameter]:
    """List the numeric parameters of a merge configuration (as plain JSON).

    `gradient`: number of points over the layers; weights and t get one value per point, and existing gradients are
    resampled. `negative`: allow weights below 0.

    UserError for a merge without numeric parameters.
    """
    found: list[MergeParameter] = []

    def walk(value: Any, path: ParameterPath, name: str) -> None:
        if isinstance(value, dict):
            for key, inside in value.items():
                walk(inside, (*path, key), key if path and path[-1] == "parameters" else name if key == "value" else "")
        elif (
            gradient > 1
            and name in ("weight", "t")
            and not isinstance(path[-1], int)
            and (numbers := _parse_gradient(value))
        ):
            found.extend(
                build_parameter((*path, at), name, start)
                for at, start in enumerate(_resample_gradient(numbers, gradient))
            )
        elif isinstance(value, list):
            for at, inside in enumerate(value):
                walk(inside, (*path, at), name)
        elif name in BOUNDS and _is_number(value):
            found.append(build_parameter(path, name, float(value)))

    def build_parameter(path: ParameterPath, name: str, start: float) -> MergeParameter:
        low, high = (-1.0, 1.5) if negative and name == "weight" else BOUNDS[name]
        return MergeParameter(path, min(low, start), max(high, start), start)

    walk(config, (), "")
    if not found:
        raise UserError(
            f"the merge has no numeric parameter to search; set initial values for its parameters ({', '.join(BOUNDS)})"
        )
    return found


def _is_number(value: Any) -> bool:
    """Return whether it is a number, or a string that YAML does not parse as one (1e-1)."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _parse_gradient(value: Any) -> list[float]:
    """Return a number or a gradient as a gradient; empty for anything else."""
    numbers = value if isinstance(value, list) else [value]
    return [float(one) for one in numbers] if all(map(_is_number, numbers)) else []


def _resample_gradient(numbers: Sequence[float], count: int) -> list[float]:
    """Resample a gradient to `count` points by linear interpolation."""
    last = len(numbers) - 1
    places = [at * last / (count - 1) for at in range(count)]
    lows = [min(int(place), max(0, last - 1)) for place in places]
    return [
        numbers[low] + (numbers[min(low + 1, last)] - numbers[low]) * (place - low)
        for place, low in zip(places, lows, strict=True)
    ]


def set_values(config: Mapping[str, Any], genes: Sequence[MergeParameter], values: Sequence[float]) -> dict[str, Any]:
    """Return the configuration with new parameter values."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for gene, value in zip(genes, values, strict=True):
        *above, last = gene.path
        place: Any = made
        for number, key in enumerate(above):
            points = sum(other.path[:-1] == gene.path[:-1] for other in genes)
            if (
                isinstance(last, int)
                and number == len(above) - 1
                and len(_parse_gradient(place[key])) not in (0, points)
            ):  # expand a number to a gradient, or resize a gradient
                place[key] = [0.0] * points
            place = place[key]
        place[last] = round(float(value), 6)
    return made
