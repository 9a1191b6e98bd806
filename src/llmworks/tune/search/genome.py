"""The numbers of a merge that can be searched: its methods' parameters, each between two bounds, each once or once for
a part of the layers.

Knows no optimizer and no model.
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
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Gene:
    """One number: where it stands, its bounds, what the file has."""

    path: Path
    low: float
    high: float
    start: float

    @property
    def name(self) -> str:
        """As --set has it."""
        return ".".join(map(str, self.path))


def genes_of(config: Mapping[str, Any], *, gradient: int = 1, negative: bool = False) -> list[Gene]:
    """The parameters of a merge's configuration (as plain JSON) that are numbers; `gradient`: weights and t once for
    each of so many points over the layers, gradients among them anew; `negative`: weights may be below 0.

    UserError for a merge without such numbers.
    """
    found: list[Gene] = []

    def walk(value: Any, path: Path, name: str) -> None:
        if isinstance(value, dict):
            for key, inside in value.items():
                walk(inside, (*path, key), key if path and path[-1] == "parameters" else name if key == "value" else "")
        elif (
            gradient > 1 and name in ("weight", "t") and not isinstance(path[-1], int) and (numbers := _numbers(value))
        ):
            found.extend(gene((*path, at), name, start) for at, start in enumerate(_points(numbers, gradient)))
        elif isinstance(value, list):
            for at, inside in enumerate(value):
                walk(inside, (*path, at), name)
        elif name in BOUNDS and _number(value):
            found.append(gene(path, name, float(value)))

    def gene(path: Path, name: str, start: float) -> Gene:
        low, high = (-1.0, 1.5) if negative and name == "weight" else BOUNDS[name]
        return Gene(path, min(low, start), max(high, start), start)

    walk(config, (), "")
    if not found:
        raise UserError(
            f"the merge has no number to search; give its parameters ({', '.join(BOUNDS)}) values to begin with"
        )
    return found


def _number(value: Any) -> bool:
    """Whether it is a number, or a text that YAML does not know as one (1e-1)."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _numbers(value: Any) -> list[float]:
    """A number, or a gradient, as a gradient; nothing for what is neither."""
    numbers = value if isinstance(value, list) else [value]
    return [float(one) for one in numbers] if all(map(_number, numbers)) else []


def _points(numbers: Sequence[float], count: int) -> list[float]:
    """A gradient of so many points: between those of another the line from one to the next."""
    last = len(numbers) - 1
    places = [at * last / (count - 1) for at in range(count)]
    lows = [min(int(place), max(0, last - 1)) for place in places]
    return [
        numbers[low] + (numbers[min(low + 1, last)] - numbers[low]) * (place - low)
        for place, low in zip(places, lows, strict=True)
    ]


def with_values(config: Mapping[str, Any], genes: Sequence[Gene], values: Sequence[float]) -> dict[str, Any]:
    """The configuration with other numbers."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for gene, value in zip(genes, values, strict=True):
        *above, last = gene.path
        place: Any = made
        for number, key in enumerate(above):
            points = sum(other.path[:-1] == gene.path[:-1] for other in genes)
            if (
                isinstance(last, int) and number == len(above) - 1 and len(_numbers(place[key])) not in (0, points)
            ):  # a number becomes a gradient, or a gradient one of other points
                place[key] = [0.0] * points
            place = place[key]
        place[last] = round(float(value), 6)
    return made
